"""What a device has room for: free bytes, and the tokens of a pass with a gradient. Knows modules and devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

GRADIENT_TOKENS = {"cpu": 1024, "cuda": 2048}  # of a pass with a gradient; on a GPU at most
SCORED_FRACTION = 0.4  # scored tokens of all in such a pass
LOGIT_COPIES = 8  # logits and what is made of them, each


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
    it, counted for Llama, Qwen2.5-7B and GPT-2 XL), and a fraction of the logits.
    """
    needed: Counter[torch.device] = Counter()
    for module, times in [*((layer, 1.0) for layer in layers), (head, LOGIT_COPIES * SCORED_FRACTION)]:
        for parameter in module.parameters():
            if parameter.ndim == 2:
                needed[parameter.device] += int(times * sum(parameter.shape) * parameter.element_size())
    room = {device: free_bytes(device) for device in needed}
    fitting = [free // 2 // needed[device] for device, free in room.items() if free is not None]
    if not fitting:
        return GRADIENT_TOKENS["cpu"]
    return min(1 << max(min(fitting), 1).bit_length() - 1, GRADIENT_TOKENS["cuda"])
