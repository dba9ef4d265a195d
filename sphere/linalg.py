"""Dense linear algebra that the mathematics of editing rests on: Gram spectra, orthonormal rows, norms.

Knows tensors only. Everything goes by the smaller side of a matrix, in blocks, so that no second copy of it and no
(in x in) matrix of the larger side is ever held.

The spectrum of a trained weight falls slowly where it is cut, and r is a good part of the smaller side: the whole
decomposition of the smaller side is faster than any method for a few leading eigenpairs, and than one that starts from
the directions of the batch before (`python -m benchmarks.principal_directions --warm_start`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sphere.errors import SphereError

# (eigenvalues (m,) in decreasing order, float64; the shape (out x in) of W_hat) -> a number r of them, and the least
# change that would make another r: of an eigenvalue, relative to the largest, or of a sum of them, relative to all.
Cut = Callable[[Tensor, Sequence[int]], tuple[int, float]]

ROW_EPS = 1e-8
BLOCKS = 4  # the normalised matrix is passed through in so many blocks of its shorter side,
MIN_BLOCK = 64  # which are no smaller than this


class UnitRowsGram:
    """W_hat, the matrix W with unit rows, by its shorter side and in blocks.

    Args:
        weight: W (out x in).
        precision: of everything computed.

    Raises:
        SphereError: a weight that is zero.
    """

    def __init__(self, weight: Tensor, precision: torch.dtype) -> None:
        self.weight, self.precision = weight, precision
        self.rows_are_fewer = weight.shape[0] <= weight.shape[1]
        self.size = min(weight.shape)
        self.block = max(MIN_BLOCK, -(-self.size // BLOCKS))
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=precision)
        if not bool(norms.any()):
            raise SphereError("The weight is zero: it has no principal directions.")
        self.scale = 1 / (norms + ROW_EPS)  # out
        # Rounding errors of sums of so many terms grow like their number's square root; what the cumulative sums were
        # ever seen to be off by, dominant directions and deficient ranks included, is a quarter of this.
        self.rounding = max(weight.shape) ** 0.5 * torch.finfo(precision).eps

    def rows(self, start: int) -> Tensor:
        """Rows (or columns, where they are fewer) of W_hat from `start` on: (block x longer side)."""
        chosen = slice(start, start + self.block)
        if self.rows_are_fewer:
            return self.weight[chosen].to(self.precision) * self.scale[chosen, None]
        return (self.weight[:, chosen].to(self.precision) * self.scale[:, None]).T

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Of the smaller Gram matrix: eigenvalues in decreasing order, float64; eigenvectors in increasing order."""
        gram = torch.zeros(self.size, self.size, dtype=self.precision, device=self.weight.device)
        for i in range(0, self.size, self.block):  # the lower triangle is enough
            left = self.rows(i)
            for j in range(0, i + 1, self.block):
                gram[i : i + self.block, j : j + self.block] = left @ (left if i == j else self.rows(j)).T
        del left
        values, vectors = torch.linalg.eigh(gram, UPLO="L")
        return values.flip(0).clamp(min=0).double(), vectors

    def right_vectors(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Orthonormal eigenvectors of W_hat^T W_hat (in x r) for leading eigenpairs of the smaller Gram matrix."""
        if not self.rows_are_fewer:
            return vectors.contiguous()
        coefficients = (vectors / values.sqrt().to(vectors)).T  # r x out
        basis = coefficients.new_zeros(len(values), self.weight.shape[1])  # U^T (r x in)
        for i in range(0, self.size, self.block):
            basis.addmm_(coefficients[:, i : i + self.block], self.rows(i))
        return orthonormal_rows(basis).T


def leading_eigenvectors(weight: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of W_hat^T W_hat / out, as many as `cut` says, and the cumulative ratios.

    The spectrum comes from the smaller of W_hat W_hat^T and W_hat^T W_hat, which share their non-zero eigenvalues. It
    is computed in the weight's precision; where it comes so close to another number r that rounding could decide, it is
    computed again in float64, so that r is the one of exact arithmetic.

    Args:
        weight: W (out x in), finite.
        cut: says how many (`sphere.cuts`); r is at most the numerical rank.

    Returns:
        U (in x r) in the weight's precision (at least float32), and the ratios (m,).
    """
    precision = torch.promote_types(weight.dtype, torch.float32)
    gram = UnitRowsGram(weight, precision)
    values, vectors = gram.spectrum()
    r, distance = cut(values, weight.shape)
    if precision != torch.float64 and distance < gram.rounding:
        del vectors
        gram = UnitRowsGram(weight, torch.float64)
        values, vectors = gram.spectrum()
        r, _ = cut(values, weight.shape)
    r = min(r, numerical_rank(values, weight.shape, precision))
    basis = gram.right_vectors(values[:r], vectors[:, -r:].flip(1)).to(precision)
    return basis, values.cumsum(0) / values.sum()


def numerical_rank(values: Tensor, shape: Sequence[int], precision: torch.dtype) -> int:
    """The rank of W_hat (out x in), given the eigenvalues of its Gram matrix in decreasing order, float64.

    Singular values below max(out, in) * eps of the largest count as zero, as far as their squares can tell.
    """
    singular = max(shape) * torch.finfo(precision).eps
    squared = max(singular**2, max(shape) * torch.finfo(values.dtype).eps)
    return int((values > squared * values[0]).sum())


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


def largest_singular_value(matrix: Tensor) -> Tensor:
    """||A||_2 from the Gram matrix of the smaller side: several times as fast as a decomposition, and as exact."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(small @ small.T)[-1].clamp(min=0).sqrt()


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out x m), s (m,) in decreasing order, V (in x m) of a matrix (out x in), m = min(out, in), in float64.

    By the Gram matrix of the smaller side: singular values below about 1e-8 of the largest are not told from zero, and
    their vectors of the larger side are zero.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    small = matrix if wide else matrix.T
    values, vectors = torch.linalg.eigh(small @ small.T)
    s, near = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    far = small.T @ near / s.clamp(min=1e-8 * s[0].clamp(min=1e-300))  # larger side x m
    return (near, s, far) if wide else (far, s, near)


def extreme_eigenvalues(matrix: Tensor, steps: int = 48) -> tuple[float, float]:
    """The smallest and the largest Ritz value of a symmetric matrix, by Lanczos with full reorthogonalisation.

    They lie within the spectrum; an eigenvalue well outside the others is found to several digits.

    Args:
        matrix: (n x n), multiplied in its own precision, at least float32.
        steps: products with the matrix.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), generator=generator, dtype=torch.float64).to(matrix.device)
    basis = torch.zeros(min(steps, len(matrix)), len(matrix), dtype=torch.float64, device=matrix.device)
    vector, diagonal, beside = start / start.norm(), [], []  # of the tridiagonal matrix
    for row in basis:
        row.copy_(vector)
        product = (matrix @ vector.to(matrix.dtype)).double()
        diagonal.append(product @ vector)
        for _ in range(2):  # once more: what rounding has left
            product -= basis.T @ (basis @ product)
        norm = product.norm()
        if norm <= torch.finfo(matrix.dtype).eps * matrix.diagonal().abs().max():
            break  # the vectors span an invariant subspace
        beside.append(norm)
        vector = product / norm
    off = torch.stack(beside[: len(diagonal) - 1]) if len(diagonal) > 1 else start.new_zeros(0)
    tridiagonal = torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)
    ritz = torch.linalg.eigvalsh(tridiagonal)
    return float(ritz[0]), float(ritz[-1])
