"""Rows of token ids as rectangles: filled up on one side, cut into groups with little filling. Knows lengths only."""

from __future__ import annotations

import heapq
import math
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


def group_by_length(
    lengths: Sequence[int], budget: int, overhead: int = PASS_OVERHEAD["cpu"]
) -> list[list[int]]:
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


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
    """Sequences laid end to end in packed rows of equal width: groups of rows of indices, each at most `budget` tokens.

    Sequences of similar length come together, in as few groups as hold them (one longer than the budget is its own);
    the width of a group is the one, up to twice its longest sequence, that leaves least empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    total = sum(lengths)
    for count in range(max(math.ceil(total / budget), 1), len(lengths) + 1):
        groups: dict[int, list[int]] = {}
        before = 0
        for index in order:
            groups.setdefault(min(before * count // max(total, 1), count - 1), []).append(index)
            before += lengths[index]
        filled = [_fill(group, lengths) for group in groups.values()]
        if all(len(group) == 1 or tokens <= budget for group, tokens in filled):
            return [group for group, _ in filled]
    return [[[index]] for index in order]


def _fill(order: Sequence[int], lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """Packed rows of sequences given in decreasing length, and their tokens with padding.

    Each sequence goes to the row that is emptiest so far, so that long and short ones mix and rows hold about as many.
    """
    longest, total = max(lengths[order[0]], 1), sum(lengths[i] for i in order)
    best: tuple[list[list[int]], int] | None = None
    for count in sorted({max(total // width, 1) for width in range(longest, 2 * longest + 1)}):
        found: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, row) for row in range(count)]  # a heap: tokens so far, row
        for index in order:
            tokens, row = emptiest[0]
            found[row].append(index)
            heapq.heapreplace(emptiest, (tokens + lengths[index], row))
        padded = count * max(emptiest)[0]
        if best is None or padded <= best[1]:
            best = [row for row in found if row], padded
    assert best is not None
    return best
