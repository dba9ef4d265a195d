"""What is held in memory, in bytes and in words: the vocabulary of the memory plan.

`sphere.runs.method_memory` says what each method keeps, `sphere.runs.plan` adds what every run keeps, docs/memory.md
explains it. Loads and allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sphere.methods.sequential_solve import PENDING, SKETCH

# What a run does, in order; an item is alive from one phase to another.
PHASES = ("second moments", "preparation", "target values", "solve", "writing", "scoring")
DEVICE, HOST, DISK = "device", "host", "disk"
FLOAT32, FLOAT64 = 4, 8  # bytes


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
    def offload_device(self) -> str:
        """Where things are that `--conserve_memory` keeps off the device."""
        return HOST if self.conserve_memory else DEVICE

    @property
    def entries(self) -> int:
        """out in, summed over the edited weights."""
        return sum(out * in_features for out, in_features in self.edited)

    @property
    def sum_squared_in(self) -> int:
        """in^2, summed over the edited weights."""
        return sum(in_features**2 for _, in_features in self.edited)

    @property
    def largest_in(self) -> int:
        """The largest in."""
        return max(in_features for _, in_features in self.edited)

    @property
    def largest(self) -> int:
        """The largest out in."""
        return max(out * in_features for out, in_features in self.edited)

    @property
    def exact_bytes(self) -> int:
        """Of one value of an edited weight in the precision that it is edited in."""
        return max(self.weight_bytes, FLOAT32)


def second_moments(sizes: Sizes) -> list[Item]:
    """E[k k^T] of the edited layers: kept by the host, collected where the corpus runs."""
    kept = Item(
        "second moments of keys", "sum of in^2 x mom2_dtype", sizes.sum_squared_in * sizes.moment_bytes, HOST
    )
    sums = Item(
        "their sums, where they are not on disk yet",
        "sum of 8 in^2",
        FLOAT64 * sizes.sum_squared_in,
        sizes.offload_device,
        until="second moments",
    )
    block = Item("keys' product", "4 in^2", FLOAT32 * sizes.largest_in**2, DEVICE, until="second moments")
    in_features = sum(size for _, size in sizes.edited)
    keys = sizes.weight_bytes * in_features + FLOAT32 * sizes.largest_in
    waiting = Item(
        "keys on their way", "8192 (b sum of in + 4 in)", 8192 * keys, DEVICE, until="second moments"
    )
    return [kept, sums, block, *([waiting] if sizes.conserve_memory else [])]


def moment_factors(sizes: Sizes) -> list[Item]:
    """Second moments as the triangles that systems are solved with, each made in its own place."""
    factors = Item(
        "Cholesky factors of the second moments",
        "sum of 8 in^2",
        FLOAT64 * sizes.sum_squared_in,
        sizes.offload_device,
        "preparation",
        "writing",
    )
    if sizes.on_cpu or sizes.conserve_memory:
        return [factors]
    size = sizes.moment_bytes * sizes.largest_in**2
    sent = Item("a moment on its way", "in^2 x mom2_dtype", size, DEVICE, "preparation", "preparation")
    return [factors, sent]


def earlier_keys(sizes: Sizes) -> list[Item]:
    """What is kept of earlier batches' keys: by the solve, as they are saved, and on the disk."""
    n, edits = sizes.num_edits, sizes.n_edits
    columns, saved, on_disk, matrices = 0, 0, 0, []
    for _, size in sizes.edited:
        beside = size // PENDING + n  # most columns beside a matrix
        columns += size * min(edits, size + beside)
        saved += size * min(edits, size + n)
        if edits > size:  # the old point and the new one
            on_disk += 2 * FLOAT64 * size * (size + SKETCH) + FLOAT32 * size * beside
            matrices.append(FLOAT64 * size**2)
        else:
            on_disk += FLOAT32 * size * edits
    kept = ("target values", "writing")
    items = [
        Item(
            "key cache of the solves",
            "sum of 8 in min(N, 9 in / 8 + n)",
            FLOAT64 * columns,
            sizes.offload_device,
            *kept,
        ),
        Item("earlier keys, as they are saved", "sum of 4 in min(N, in + n)", FLOAT32 * saved, HOST, *kept),
        Item(
            "earlier keys on the disk, or their matrices twice",
            "4 in N, or 16 in^2 + 4 in (in / 8 + n)",
            on_disk,
            DISK,
        ),
    ]
    if not matrices:
        return items
    made = Item(
        "one of the matrices in the making",
        "8 in^2",
        max(matrices),
        sizes.offload_device,
        "writing",
        "writing",
    )
    if sizes.on_cpu or sizes.conserve_memory:
        return [*items, made]
    sent = Item(
        "matrices on their way to the disk", "sum of 8 in^2", sum(matrices), HOST, "writing", "writing"
    )
    return [*items, made, sent]
