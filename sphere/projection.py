"""The SPHERE projection: keep an update away from the principal hyperspherical directions of a weight.

The rows of W (out x in) are neurons; normalised, they lie on a hypersphere, and W_hat^T W_hat / out tells in which
directions they crowd. An update's part in the leading r of these directions is suppressed (SPHERE, arXiv 2510.01172,
section 4). Takes any weight and any update; knows nothing of models or methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.errors import SphereError

ROW_EPS = 1e-8


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
    spectrum comes from the smaller of W_hat W_hat^T and W_hat^T W_hat, which share their non-zero eigenvalues.

    Args:
        weight: W (out x in), rows are neurons.
        beta_hse: cumulative ratio, in (0, 1].

    Returns:
        U (in x r) in the weight's precision (at least float32).

    Raises:
        SphereError: a weight that is no finite matrix, or beta_hse out of range.
    """
    check_beta(beta_hse)
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise SphereError("The weight whose principal directions are wanted is no finite (out x in) matrix.")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    normed = weight / (weight.norm(dim=1, keepdim=True) + ROW_EPS)  # out x in
    out_features, in_features = normed.shape
    rows_are_fewer = out_features <= in_features
    gram = normed @ normed.T if rows_are_fewer else normed.T @ normed
    values, vectors = torch.linalg.eigh(gram)  # ascending
    values, vectors = values.flip(0).clamp(min=0).double(), vectors.flip(1)
    tolerance = max(out_features, in_features) * torch.finfo(weight.dtype).eps
    rank = int((values > tolerance * values[0]).sum())
    if rank == 0:
        raise SphereError("The weight is zero: it has no principal directions.")
    ratio = values.cumsum(0) / values.sum()
    r = min(int((ratio <= beta_hse).sum()) + 1, rank)
    leading = vectors[:, :r]
    if rows_are_fewer:  # right singular vectors from the left ones
        leading = normed.T @ (leading / values[:r].sqrt().to(leading))
        leading = torch.linalg.qr(leading).Q  # weak directions lose orthogonality to rounding
    return PrincipalDirections(leading, float(ratio[r - 1]))


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
    return delta - alpha * (delta @ basis) @ basis.T


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
