"""The null space of preserved knowledge: directions that the keys of a corpus hardly use (AlphaEdit, eq. 9-10)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.errors import SphereError

log = logging.getLogger(__name__)


PIECE = 1024  # columns of a basis that are widened at a time
# An eigendecomposition holds the moment, its eigenvectors, LAPACK's work space of two such matrices, and the basis.
DECOMPOSITION = 4.5


@dataclass(frozen=True)
class Projector:
    """P = N N^T on a subspace, kept as the thinner of N and its orthogonal complement Q (P = I - Q Q^T).

    Attributes:
        basis: (in x m) orthonormal columns of N, or of Q where `complement`; float32, m <= in / 2.
        complement: whether `basis` spans what P removes.
        dim: dimension of the subspace that P keeps.
    """

    basis: Tensor
    complement: bool
    dim: int

    def apply(self, x: Tensor) -> Tensor:
        """P x for x (in x n), on x's device and in its precision."""
        result = x.clone() if self.complement else torch.zeros_like(x)
        sign = -1 if self.complement else 1
        for start in range(0, self.basis.shape[1], PIECE):
            piece = (
                self.basis[:, start : start + PIECE].to(x.device).to(x.dtype)
            )  # the narrower numbers travel
            result.addmm_(piece, piece.T @ x, alpha=sign)
        return result

    def to(self, device: torch.device | str) -> Projector:
        """The same projector on another device."""
        return Projector(self.basis.to(device), self.complement, self.dim)


def null_space_projector(second_moment: Tensor, threshold: float) -> Projector:
    """Projector on the eigenvectors of E[k k^T] whose eigenvalues are below `threshold`.

    Args:
        second_moment: (in x in), symmetric; it is decomposed in its own precision (at least float32).
        threshold: `nullspace_threshold`, in the units of the squared keys.

    Raises:
        SphereError: no eigenvalue below the threshold: nothing could be edited.
    """
    moment = second_moment.to(torch.promote_types(second_moment.dtype, torch.float32))
    values, vectors = torch.linalg.eigh(moment)  # ascending; of the lower triangle
    dim = int((values < threshold).sum())
    size = len(values)
    if dim == 0:
        raise SphereError(
            f"No eigenvalue of the second moment is below nullspace_threshold {threshold:g} (smallest "
            f"{values[0].item():.3g}, largest {values[-1].item():.3g}): raise nullspace_threshold."
        )
    if dim == size:
        log.warning(
            "All %d eigenvalues are below nullspace_threshold %g: P is the identity.", size, threshold
        )
    complement = dim > size // 2
    basis = vectors[:, dim:] if complement else vectors[:, :dim]
    return Projector(basis.float().contiguous(), complement, dim)


def decomposition_bytes(size: int) -> int:
    """What making the projector of a (size x size) float32 second moment takes at most."""
    return int(DECOMPOSITION * torch.float32.itemsize * size**2)
