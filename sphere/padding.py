"""Rows of token ids as rectangles: filled up on one side, cut into groups with little filling. Knows lengths only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What a forward pass costs beside its tokens (starting kernels, reading weights), as a number of tokens.
PASS_OVERHEAD = {"cpu": 16, "cuda": 256}


def pad_left(rows: Sequence[Sequence[int]], width: int, value: int, device: torch.device) -> Tensor:
    """(rows x width) of token ids, each row's tokens at its end."""
    return torch.tensor([[value] * (width - len(r)) + list(r) for r in rows], dtype=torch.long, device=device)


def pad_right(rows: Sequence[Sequence[int]], width: int, value: int, device: torch.device) -> Tensor:
    """(rows x width) of token ids, each row's tokens at its beginning."""
    return torch.tensor([list(r) + [value] * (width - len(r)) for r in rows], dtype=torch.long, device=device)


def packs(lengths: Sequence[int], budget: int, overhead: int = PASS_OVERHEAD["cpu"]) -> list[list[int]]:
    """Indices of rows in groups of similar length, each at most `budget` tokens when padded (never empty).

    Of all ways to cut the rows, sorted by length, into such groups: one with the least padded tokens, a further group
    counted as `overhead` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    least, begin = [0.0], [0]  # of the first `end` rows: the cost, and where their last group begins
    for end, index in enumerate(order, start=1):
        width = max(lengths[index], 1)
        lowest = min(max(end - budget // width, 0), end - 1)
        cost, start = min((least[i] + (end - i) * width, i) for i in range(lowest, end))
        least.append(cost + overhead)
        begin.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begin[end] : end])
        end = begin[end]
    return groups[::-1]
