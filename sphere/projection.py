"""The SPHERE projection: keep an update away from the principal hyperspherical directions of a weight.

The rows of W (out x in) are neurons; normalised, they lie on a hypersphere, and W_hat^T W_hat / out tells in which
directions they crowd. An update's part in the leading r of these directions is suppressed (SPHERE, arXiv 2510.01172,
section 4). Takes any weight and any update; knows nothing of models or methods.

The spectrum of a trained weight falls slowly where it is cut, and r is a good part of the smaller side: the whole
decomposition of the smaller side is faster than any method for a few leading eigenpairs, and than one that starts from
the directions of the batch before (`python -m benchmarks.principal_directions --warm_start`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.errors import SphereError

ROW_EPS = 1e-8
PIECES = 4  # W_hat is passed through in so many pieces of its shorter side,
MIN_PIECE = 64  # which are no smaller than this


@dataclass(frozen=True)
class PrincipalDirections:
    """Orthonormal principal directions of a weight's neurons.

    Attributes:
        basis: U (in x r).
        share: part of the spectrum that the r directions carry, in [0, 1].
    """

    basis: Tensor
    share: float

    @property
    def rank(self) -> int:
        """r, the number of principal directions."""
        return self.basis.shape[1]


def principal_directions(weight: Tensor, beta_hse: float) -> PrincipalDirections:
    """The leading r eigenvectors of W_hat^T W_hat / out.

    r = (number of leading cumulative sums of eigenvalues / total that are <= beta_hse) + 1, at most the rank. The
    spectrum comes from the smaller of W_hat W_hat^T and W_hat^T W_hat, which share their non-zero eigenvalues. It is
    computed in the weight's precision; where a cumulative sum comes so close to beta_hse that rounding could decide r,
    it is computed again in float64, so that r is the one of exact arithmetic.

    Args:
        weight: W (out x in), rows are neurons.
        beta_hse: cumulative ratio, in (0, 1].

    Returns:
        U (in x r) in the weight's precision (at least float32).

    Raises:
        SphereError: a weight that is no finite matrix, or beta_hse out of range.
    """
    check_beta(beta_hse)
    if weight.ndim != 2 or not weight.numel() or not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise SphereError("The weight whose principal directions are wanted is no finite (out x in) matrix.")
    precision = torch.promote_types(weight.dtype, torch.float32)
    neurons = _Neurons(weight, precision)
    values, vectors = neurons.spectrum()
    ratio = values.cumsum(0) / values.sum()
    doubt = (ratio - beta_hse).abs().min() < neurons.rounding
    close_to_one = beta_hse > 1 - max(weight.shape) * torch.finfo(precision).eps  # the rank could decide r
    if precision != torch.float64 and (doubt or close_to_one):
        del vectors
        neurons = _Neurons(weight, torch.float64)
        values, vectors = neurons.spectrum()
        ratio = values.cumsum(0) / values.sum()
    r = min(int((ratio <= beta_hse).sum()) + 1, numerical_rank(values, weight.shape, precision))
    basis = neurons.right_vectors(values[:r], vectors[:, -r:].flip(1))
    return PrincipalDirections(basis.to(precision), float(ratio[r - 1]))


def numerical_rank(values: Tensor, shape: Sequence[int], precision: torch.dtype) -> int:
    """The rank of W_hat (out x in), given the eigenvalues of its Gram matrix in decreasing order, float64.

    Singular values below max(out, in) * eps of the largest count as zero, as far as their squares can tell.
    """
    singular = max(shape) * torch.finfo(precision).eps
    squared = max(singular**2, max(shape) * torch.finfo(values.dtype).eps)
    return int((values > squared * values[0]).sum())


class _Neurons:
    """W_hat by its shorter side, in pieces: a full copy of it is never held.

    Args:
        weight: W (out x in).
        precision: of everything computed.
    """

    def __init__(self, weight: Tensor, precision: torch.dtype) -> None:
        self.weight, self.precision = weight, precision
        self.rows_are_fewer = weight.shape[0] <= weight.shape[1]
        self.size = min(weight.shape)
        self.piece = max(MIN_PIECE, -(-self.size // PIECES))
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=precision)
        if not bool(norms.any()):
            raise SphereError("The weight is zero: it has no principal directions.")
        self.scale = 1 / (norms + ROW_EPS)  # out
        # Rounding errors of sums of so many terms grow like their number's square root; what the cumulative sums were
        # ever seen to be off by, dominant directions and deficient ranks included, is a quarter of this.
        self.rounding = max(weight.shape) ** 0.5 * torch.finfo(precision).eps

    def part(self, start: int) -> Tensor:
        """Rows (or columns, where they are fewer) of W_hat from `start` on: (piece x longer side)."""
        chosen = slice(start, start + self.piece)
        if self.rows_are_fewer:
            return self.weight[chosen].to(self.precision) * self.scale[chosen, None]
        return (self.weight[:, chosen].to(self.precision) * self.scale[:, None]).T

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Of the smaller Gram matrix: eigenvalues in decreasing order, float64; eigenvectors in increasing order."""
        gram = torch.zeros(self.size, self.size, dtype=self.precision, device=self.weight.device)
        for i in range(0, self.size, self.piece):  # the lower triangle is enough
            left = self.part(i)
            for j in range(0, i + 1, self.piece):
                gram[i : i + self.piece, j : j + self.piece] = left @ (left if i == j else self.part(j)).T
        del left
        values, vectors = torch.linalg.eigh(gram, UPLO="L")
        return values.flip(0).clamp(min=0).double(), vectors

    def right_vectors(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Orthonormal eigenvectors of W_hat^T W_hat (in x r) for leading eigenpairs of the smaller Gram matrix."""
        if not self.rows_are_fewer:
            return vectors.contiguous()
        coefficients = (vectors / values.sqrt().to(vectors)).T  # r x out
        basis = coefficients.new_zeros(len(values), self.weight.shape[1])  # U^T (r x in)
        for i in range(0, self.size, self.piece):
            basis.addmm_(coefficients[:, i : i + self.piece], self.part(i))
        return orthonormal_rows(basis).T


def orthonormal_rows(basis: Tensor) -> Tensor:
    """The same row space (r x n) with orthonormal rows, for rows that are nearly so; `basis` may be overwritten.

    Right singular vectors that come from left ones lose orthogonality to rounding where they are weak: by one Cholesky
    step they get it back, or by a QR decomposition where too much of it is gone.
    """
    overlap = basis @ basis.T  # r x r
    overlap.diagonal().sub_(1)
    error = float(overlap.abs().max())
    if error < 16 * torch.finfo(basis.dtype).eps:
        return basis
    if error > 0.1:
        return torch.linalg.qr(basis.T).Q.T
    overlap.diagonal().add_(1)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(overlap), basis, upper=False)


def project_update(delta: Tensor, weight: Tensor, beta_hse: float, alpha: float) -> Tensor:
    """Delta - alpha (Delta U) U^T with the principal directions U of `weight`.

    Args:
        delta: update (out x in) of the weight.
        weight: W (out x in) as it stands before the update.
        beta_hse: cumulative ratio; 0 returns the update unchanged.
        alpha: suppression strength; 1 removes the principal part, 0 keeps it.

    Returns:
        (out x in), of the update's dtype.
    """
    check_alpha(alpha)
    if delta.shape != weight.shape:
        raise SphereError(
            f"The update has shape {tuple(delta.shape)}, the weight (out x in) has {tuple(weight.shape)}."
        )
    if beta_hse == 0:
        return delta
    return suppress(delta, principal_directions(weight, beta_hse).basis, alpha)


def suppress(delta: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """Delta - alpha (Delta U) U^T for delta (out x in) and U (in x r)."""
    basis = basis.to(delta)
    return torch.addmm(delta, delta @ basis, basis.T, alpha=-alpha)


def check_beta(beta_hse: float) -> None:
    """`beta_hse` is a ratio; 0 stands for "no projection" and is the caller's to handle."""
    if not 0 <= beta_hse <= 1:
        raise SphereError(
            f"beta_hse is a cumulative ratio between 0 and 1, got {beta_hse}: correct --beta_hse."
        )


def check_alpha(alpha: float) -> None:
    """`alpha` scales what is taken away: between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise SphereError(f"alpha is a suppression strength between 0 and 1, got {alpha}: correct --alpha.")
