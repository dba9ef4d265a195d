"""Updates as sums over the facts of a batch: Delta = L R^T = sum_i l_i r_i^T, a column of L and of R for each fact.

What one fact adds can be taken out again by leaving out its columns, and Delta takes n (out + in) numbers in place of
out x in. Knows tensors; knows nothing of methods, rules or files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-3  # relative, far above rounding


class Factors(NamedTuple):
    """L (out x n) and R (in x n) of an update, their columns in the order of the batch's requests."""

    left: Tensor
    right: Tensor

    def delta(self, columns: list[int] | None = None) -> Tensor:
        """The sum over these columns (all by default): (out x in) in float64."""
        left, right = (part.double() if columns is None else part[:, columns].double() for part in self)
        return left @ right.T


class BatchUpdates:
    """What one batch adds to each weight, as it is written: factors where all of its updates have them, else the sum.

    Args:
        n_requests: of the batch; factors with another number of columns say nothing of its facts.
        keep_whole: keep updates that have no factors, which are as large as their weights.
    """

    def __init__(self, n_requests: int, keep_whole: bool) -> None:
        self.n_requests, self.keep_whole = n_requests, keep_whole
        self._factors: dict[str, list[Factors]] = {}
        self._whole: dict[str, Tensor] = {}
        self._lost: set[str] = set()

    def add(self, name: str, delta: Tensor, factors: Factors | None) -> None:
        """Note an update (out x in) of a weight, with its factors where it has some."""
        if name in self._lost:
            return
        if factors is not None and name not in self._whole and _agree(delta, factors):
            parts = Factors(*(part.to(delta.dtype).to("cpu", copy=True) for part in factors))
            self._factors.setdefault(name, []).append(parts)
            return
        earlier = self._factors.pop(name, [])
        if not self.keep_whole:
            self._lost.add(name)
            return
        whole = self._whole.get(name, torch.zeros((), dtype=delta.dtype)) + delta.cpu()
        self._whole[name] = sum((part.delta().to(delta.dtype) for part in earlier), start=whole)

    def factors(self) -> dict[str, Factors]:
        """Weight name -> factors of the batch's update, of the weights that have them."""
        joined = {
            name: Factors(*(torch.cat(side, dim=1).contiguous() for side in zip(*parts, strict=True)))
            for name, parts in self._factors.items()
        }
        return {name: one for name, one in joined.items() if one.left.shape[1] == self.n_requests}

    def whole(self) -> dict[str, Tensor]:
        """Weight name -> the batch's update (out x in), of the weights without factors, where it is kept."""
        odd = self._factors.keys() - self.factors().keys()
        sums = {name: sum(part.delta() for part in self._factors[name]) for name in odd}
        kept = {name: torch.as_tensor(value).to(self._factors[name][0].left) for name, value in sums.items()}
        return self._whole | kept if self.keep_whole else {}


def _agree(delta: Tensor, factors: Factors) -> bool:
    """Whether L R^T is the update, as a random vector sees it: a method may have changed one and not the other."""
    left, right = factors
    if left.shape != (len(delta), right.shape[1]) or len(right) != delta.shape[1]:
        return False
    v = torch.randn(delta.shape[1], generator=torch.Generator().manual_seed(0)).to(delta)  # in
    expected = delta @ v
    found = (left @ (right.T @ v.to(right))).to(expected)
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm())
