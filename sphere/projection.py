"""The SPHERE projection (arXiv 2510.01172, section 4): keep an update away from a weight's principal directions.

The rows of W (out x in) are neurons; with unit length they lie on a hypersphere, and the eigenvectors of
W_hat^T W_hat / out tell in which directions they crowd. With U (in x r) the leading r of them,

    r = #{i : (lambda_1 + ... + lambda_i) / (lambda_1 + ... + lambda_in) <= beta_hse} + 1,
    Delta <- Delta - alpha (Delta U) U^T.

Takes any weight and any update; knows nothing of models or methods. The numerics are in `sphere.linalg`; numbers
r and alpha that set themselves are in `sphere.cuts` and `sphere.strength`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.cuts import cut_of
from sphere.errors import SphereError
from sphere.linalg import leading_eigenvectors
from sphere.strength import AUTO, OrAuto, check_alpha, check_beta


@dataclass(frozen=True)
class PrincipalDirections:
    """Orthonormal principal directions U (in x r) of a weight, and the fraction of the spectrum that they carry."""

    basis: Tensor
    fraction: float

    @property
    def rank(self) -> int:
        """r, the number of principal directions."""
        return self.basis.shape[1]


def principal_directions(weight: Tensor, beta_hse: OrAuto) -> PrincipalDirections:
    """U (in x r) of a weight W (out x in) at the cumulative ratio `beta_hse` in (0, 1], in at least float32.

    With `beta_hse` "auto", r is the number of singular values of W_hat above the noise (`sphere.cuts.above_noise`).

    Raises:
        SphereError: a weight that is no finite matrix or is zero, or beta_hse out of range.
    """
    check_beta(beta_hse)
    if weight.ndim != 2 or not weight.numel() or not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise SphereError("The weight whose principal directions are wanted is no finite (out x in) matrix.")
    basis, ratio = leading_eigenvectors(weight, cut_of(beta_hse))
    return PrincipalDirections(basis, float(ratio[basis.shape[1] - 1]))


def project_update(delta: Tensor, weight: Tensor, beta_hse: OrAuto, alpha: float) -> Tensor:
    """Delta - alpha (Delta U) U^T (out x in), with U of the weight (out x in); beta_hse 0 changes nothing."""
    check_alpha(alpha)
    if alpha == AUTO:
        raise SphereError(
            "alpha 'auto' needs the unedited weight: use sphere.rules.Sphere, or give a number.",
            argument="alpha",
        )
    if delta.shape != weight.shape:
        raise SphereError(
            f"The update has shape {tuple(delta.shape)}, the weight (out x in) has {tuple(weight.shape)}."
        )
    return suppress(delta, principal_directions(weight, beta_hse).basis, alpha) if beta_hse else delta


def suppress(delta: Tensor, basis: Tensor, alpha: float, inside: Tensor | None = None) -> Tensor:
    """Delta - alpha (Delta U) U^T for delta (out x in) and U (in x r): alpha 1 removes the principal part.

    Args:
        inside: Delta U (out x r), where it is known.
    """
    basis = basis.to(delta)
    return torch.addmm(delta, delta @ basis if inside is None else inside, basis.T, alpha=-alpha)
