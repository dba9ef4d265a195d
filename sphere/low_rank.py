"""A change of a weight as a product of two thin matrices.

A batch of n facts changes a weight by Delta = R X^T with n columns, and a projection of Delta keeps it so: the change
after n edits has at most rank n. What a file of weights holds is that change and rounding. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sphere.factors import Factors
from sphere.linalg import thin_svd

# Of roundings that are independent and evenly spread, the root of the mean square is about a fifth of eps times the
# entry; a half leaves nothing to chance.
ROUNDING = 0.5
SMALLEST = 1e-8  # singular values below it, relative to the largest, are not told from zero


class Decomposition:
    """The singular value decomposition of a change, from which its factors of any rank are taken.

    Args:
        change: Delta (out x in).
    """

    def __init__(self, change: Tensor) -> None:
        self.shape = change.shape
        self._u, self._s, self._v = thin_svd(change)
        energies = self._s.square().flip(0).cumsum(0).flip(0)
        self._tails = torch.cat([energies, energies.new_zeros(1)]).sqrt()  # (m + 1,): ||Delta - Delta_k||_F

    @property
    def norm(self) -> float:
        """||Delta||_F."""
        return float(self._tails[0])

    def error(self, rank: int) -> float:
        """||Delta - Delta_k||_F / ||Delta||_F of the best Delta_k of a rank; 0 for no change."""
        return float(self._tails[min(rank, len(self._s))]) / self.norm if self.norm else 0.0

    def factors(self, rank: int) -> Factors:
        """The best of a rank (Eckart and Young 1936), in float64; both sides have the same scale."""
        root = self._s[:rank].sqrt()
        return Factors(self._u[:, :rank] * root, self._v[:, :rank] * root)

    def exact_rank(self, n_edits: int, rounding: float) -> int | None:
        """The rank at which nothing but rounding is left of a change; None where that saves nothing.

        Args:
            n_edits: the rank that so many edits have, unless a method's changes are of another one.
            rounding: the Frobenius norm of what is rounding in the change.
        """
        told = int((self._s > SMALLEST * self._s[0]).sum())
        enough = int((self._tails > rounding).sum())
        rank = max(enough, min(n_edits, told))
        out, in_ = self.shape
        return rank if rank * (out + in_) < out * in_ else None


def rounding_norm(weight: Tensor, dtype: torch.dtype, writes: int = 1) -> float:
    """A bound for the Frobenius norm of what rounding has left in a weight that was written so many times."""
    return ROUNDING * torch.finfo(dtype).eps * writes**0.5 * float(weight.double().norm())


def padded(factors: Factors, rank: int) -> Factors:
    """The same sum with columns of zeros up to `rank` of them."""
    missing = rank - factors.left.shape[1]
    return Factors(pad(factors.left, (0, missing)), pad(factors.right, (0, missing)))


def converted(factors: Factors, dtype: torch.dtype) -> Factors:
    """In another dtype, contiguous, on the CPU."""
    return Factors(*(side.to("cpu", dtype).contiguous() for side in factors))
