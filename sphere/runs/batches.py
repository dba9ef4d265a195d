"""Where a run's batches end. A run that was continued with further facts has parts, and each is cut by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

PARTS = "parts"  # key of run.json: number of edits at which each part begins, where there are several
T = TypeVar("T")


def batch_ends(n: int, size: int, parts: Sequence[int] = (0,)) -> list[int]:
    """Number of edits after each batch.

    Args:
        n: edits in all.
        size: of a batch; the last one of each part may be smaller.
        parts: edits at which each part begins.
    """
    return [
        min(start + size, stop) for begin, stop in pairwise((*parts, n)) for start in range(begin, stop, size)
    ]


def cut(items: Sequence[T], ends: Sequence[int]) -> list[Sequence[T]]:
    """The batches that end there."""
    return [items[start:stop] for start, stop in pairwise((0, *ends))]


def parts_of(config: Mapping[str, Any]) -> list[int]:
    """Where the parts of a run begin, as its `run.json` says."""
    return list(config.get(PARTS, (0,)))
