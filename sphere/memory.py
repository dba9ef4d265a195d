"""What is held in memory, in bytes and in words: the vocabulary of the memory plan.

Each method says what it keeps (`Method.memory`), `sphere.plan` adds what every run keeps, docs/memory.md explains it.
Loads and allocates nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

# What a run does, in order; an item is alive from one phase to another.
PHASES = ("second moments", "preparation", "target values", "solve", "writing", "scoring")
DEVICE, HOST, DISK = "device", "host", "disk"
FLOAT32, FLOAT64 = 4, 8  # bytes
GRADIENT_TOKENS = {"cpu": 1024, "cuda": 2048}  # of a pass with a gradient; on a GPU at most
SCORED_SHARE, LOGIT_COPIES = (
    0.4,
    8,
)  # scored tokens of all in such a pass; logits and what is made of them, each


@dataclass(frozen=True)
class Item:
    """Something that takes memory.

    Attributes:
        what: in words.
        formula: its bytes, in the symbols of docs/memory.md.
        size: its bytes.
        place: DEVICE, HOST or DISK.
        since, until: phases, both included.
    """

    what: str
    formula: str
    size: int
    place: str
    since: str = PHASES[0]
    until: str = PHASES[-1]

    def alive(self, phase: str) -> bool:
        """Whether it is there in that phase."""
        return PHASES.index(self.since) <= PHASES.index(phase) <= PHASES.index(self.until)


@dataclass(frozen=True)
class Sizes:
    """What an item's size depends on.

    Attributes:
        edited: (out, in) of each edited weight.
        weight_bytes: of one value of the model.
        moment_bytes: of one value of a second moment as it is kept.
        n_edits: of the whole run.
        num_edits: of a batch.
        conserve_memory: whether what is only needed now and then stays off the device.
        on_cpu: whether the device is the host itself.
    """

    edited: tuple[tuple[int, int], ...]
    weight_bytes: int
    moment_bytes: int
    n_edits: int
    num_edits: int
    conserve_memory: bool = False
    on_cpu: bool = False

    @property
    def spared(self) -> str:
        """Where things are that `--conserve_memory` keeps off the device."""
        return HOST if self.conserve_memory else DEVICE

    @property
    def entries(self) -> int:
        """out in, summed over the edited weights."""
        return sum(out * inside for out, inside in self.edited)

    @property
    def squares(self) -> int:
        """in^2, summed over the edited weights."""
        return sum(inside**2 for _, inside in self.edited)

    @property
    def widest(self) -> int:
        """The largest in."""
        return max(inside for _, inside in self.edited)

    @property
    def largest(self) -> int:
        """The largest out in."""
        return max(out * inside for out, inside in self.edited)

    @property
    def exact_bytes(self) -> int:
        """Of one value of an edited weight in the precision that it is edited in."""
        return max(self.weight_bytes, FLOAT32)


def free_bytes(device: torch.device) -> int | None:
    """What is free on a GPU, PyTorch's own reserve included; None for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes are free on a device, as far as it tells."""
    free = free_bytes(device)
    return free is None or free >= size


def gradient_tokens(layers: Iterable[nn.Module], head: nn.Module) -> int:
    """How many tokens a pass with a gradient through `layers` may hold.

    On a CPU, as many as keep its cores busy. On GPUs, what half of their free memory holds, down to a power of two, so
    that a repeated run is cut alike. What a token takes is about what enters and leaves its linear maps (0.7 to 1.3 of
    it, counted for Llama, Qwen2.5-7B and GPT-2 XL), and a share of the logits.
    """
    needed: Counter[torch.device] = Counter()
    for module, times in [*((layer, 1.0) for layer in layers), (head, LOGIT_COPIES * SCORED_SHARE)]:
        for parameter in module.parameters():
            if parameter.ndim == 2:
                needed[parameter.device] += int(times * sum(parameter.shape) * parameter.element_size())
    room = {device: free_bytes(device) for device in needed}
    fitting = [free // 2 // needed[device] for device, free in room.items() if free is not None]
    if not fitting:
        return GRADIENT_TOKENS["cpu"]
    return min(1 << max(min(fitting), 1).bit_length() - 1, GRADIENT_TOKENS["cuda"])


def second_moments(sizes: Sizes) -> list[Item]:
    """E[k k^T] of the edited layers: kept by the host, collected where the corpus runs."""
    kept = Item(
        "second moments of keys", "sum of in^2 x mom2_dtype", sizes.squares * sizes.moment_bytes, HOST
    )
    sums = Item(
        "their sums, where they are not on disk yet",
        "sum of 8 in^2",
        FLOAT64 * sizes.squares,
        sizes.spared,
        until="second moments",
    )
    block = Item("keys' product", "4 in^2", FLOAT32 * sizes.widest**2, DEVICE, until="second moments")
    inside = sum(size for _, size in sizes.edited)
    keys = sizes.weight_bytes * inside + FLOAT32 * sizes.widest
    waiting = Item(
        "keys on their way", "8192 (b sum of in + 4 in)", 8192 * keys, DEVICE, until="second moments"
    )
    return [kept, sums, block, *([waiting] if sizes.conserve_memory else [])]


def moment_factors(sizes: Sizes) -> list[Item]:
    """Second moments as the triangles that systems are solved with, each made in its own place."""
    factors = Item(
        "Cholesky factors of the second moments",
        "sum of 8 in^2",
        FLOAT64 * sizes.squares,
        sizes.spared,
        "preparation",
        "writing",
    )
    if sizes.on_cpu or sizes.conserve_memory:
        return [factors]
    size = sizes.moment_bytes * sizes.widest**2
    sent = Item("a moment on its way", "in^2 x mom2_dtype", size, DEVICE, "preparation", "preparation")
    return [factors, sent]


def key_cache(sizes: Sizes) -> list[Item]:
    """What the solve keeps of earlier batches' keys."""
    columns = [min(sizes.n_edits, inside) for _, inside in sizes.edited]
    cache = sum(inside * n for (_, inside), n in zip(sizes.edited, columns, strict=True))
    return [
        Item(
            "key cache of the solves",
            "sum of 8 in min(N, in)",
            FLOAT64 * cache,
            sizes.spared,
            "target values",
            "writing",
        ),
        Item(
            "earlier keys, as they are saved",
            "sum of 4 in N",
            FLOAT32 * sizes.n_edits * sum(inside for _, inside in sizes.edited),
            HOST,
            "target values",
            "writing",
        ),
    ]
