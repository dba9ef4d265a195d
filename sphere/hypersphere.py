"""How a weight's neurons lie on the unit hypersphere: energy, uniformity, cosines, and what an update does to them.

Rows of W (out x in) are neurons w_i; only their directions w_i / ||w_i|| count. Hyperspherical energy and its change
under editing: SPHERE (arXiv 2510.01172, section 3) after Liu et al. 2018 (arXiv 1805.09298). Works for any matrix;
knows nothing of models, methods or files.

All sums run over pairs of neurons in blocks of rows, so that beside the weight only a few blocks are in memory
(about 0.1 GB for 3584 x 18944). Three conventions hold throughout:

- Zero rows (norm below `ZERO_NORM`) have no direction: they are left out, of sums and of counts.
- Distances below `DISTANCE_EPS` (duplicate rows) count as `DISTANCE_EPS`, so that duplicates weigh much but
  finitely: 1 / 1e-6 each for s = 1. Duplicates still belong to the sum.
- d^2 = 2 - 2 cos loses its digits for neighbours. Pairs that are near for float32 are computed again, by a float64
  Gram block or, for the nearest, from the difference itself; sums are kept in float64. The relative error against
  plain float64 is below 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sphere.errors import SphereError

ZERO_NORM = 1e-30  # row norms below count as zero
DISTANCE_EPS = 1e-6  # distances below count as this
BLOCK_ROWS = 1024  # rows per block where in_features is small
BLOCK_ENTRIES = 4_000_000  # entries per block of rows, 32 MB in float64
NEAR_FLOAT32 = 0.1  # d^2 below: a float32 Gram is not exact enough (times s for s > 1)
NEAR_FLOAT64 = 1e-6  # d^2 below: not even a float64 Gram is
MANY_NEAR = 1 / 64  # share of near pairs in a block from which the whole block is computed in float64
PLAIN_BETA = 0.5  # the paper's beta_hse: principal directions that are measured where no hook says which

NOT_FINITE = "Hyperspherical measures need a finite (out x in) matrix of floating-point numbers."


def hyperspherical_energy(weight: Tensor, s: float = 1.0) -> float:
    """Sum over i != j of 1 / ||w_i - w_j||^s over normalised rows; of log(1 / ||w_i - w_j||) for s = 0.

    SPHERE (arXiv 2510.01172, section 3). Low energy: neurons spread evenly; high energy: they crowd.

    Args:
        weight: W (out x in), any floating dtype and device.
        s: exponent, >= 0.

    Returns:
        The energy; 0.0 for fewer than two non-zero rows.

    Raises:
        SphereError: no finite matrix, a negative s, or an energy too large for float64.
    """
    if not (math.isfinite(s) and s >= 0):
        raise SphereError(f"The exponent s of the hyperspherical energy must be 0 or larger, got {s}.")
    total = 0.0
    for squared in _squared_distances(weight, NEAR_FLOAT32 * max(1.0, s)):
        total += 2.0 * float(_repulsion(squared, s).sum())
    if not math.isfinite(total):
        raise SphereError(f"The hyperspherical energy for s = {s} exceeds float64: use a smaller s.")
    return total


def _repulsion(squared: Tensor, s: float) -> Tensor:
    """1 / d^s (log(1/d) for s = 0) from squared distances."""
    squared = squared.clamp(min=DISTANCE_EPS**2)
    if s == 0:
        return -0.5 * squared.log()
    return squared.rsqrt() if s == 1 else squared.pow(-0.5 * s)


def energy_change(weight: Tensor, reference: Tensor, s: float = 1.0) -> float:
    """(E(W) - E(W_ref)) / |E(W_ref)|, the relative change of the energy against a reference, e.g. the unedited weight.

    Raises:
        SphereError: different shapes, or a reference without energy (fewer than two non-zero rows).
    """
    if weight.shape != reference.shape:
        raise SphereError(
            f"The weight has shape {tuple(weight.shape)}, its reference {tuple(reference.shape)}: "
            "compare a weight with its own earlier state."
        )
    return _relative(hyperspherical_energy(weight, s), hyperspherical_energy(reference, s))


def _relative(energy: float, reference: float) -> float:
    if reference == 0:
        raise SphereError("The reference weight has no hyperspherical energy to compare with.")
    return (energy - reference) / abs(reference)


def uniformity(weight: Tensor, t: float = 2.0) -> float:
    """log of the mean over i != j of exp(-t ||w_i - w_j||^2) (Wang & Isola 2020, arXiv 2005.10242).

    In [-4t, 0]; lower is more uniform.

    Raises:
        SphereError: no finite matrix, t not positive, or fewer than two non-zero rows.
    """
    if not (math.isfinite(t) and t > 0):
        raise SphereError(f"The temperature t of the uniformity must be positive, got {t}.")
    log_sum, pairs = -math.inf, 0
    for squared in _squared_distances(weight, NEAR_FLOAT32):
        block = float(torch.logsumexp(-t * squared, 0))
        log_sum = max(log_sum, block) + math.log1p(math.exp(-abs(log_sum - block)))
        pairs += squared.numel()
    _check_pairs(pairs)
    return log_sum - math.log(pairs)


def cosine_distribution(
    weight: Tensor, bins: int = 200, low: float = -1.0, high: float = 1.0
) -> dict[str, Any]:
    """Histogram of the cosine similarity of all pairs of neurons i < j.

    Args:
        weight: W (out x in).
        bins: number of equal bins over [low, high]; cosines outside count in the outermost bins.

    Returns:
        {"edges": bins + 1 floats, "counts": bins ints, "mean": float, "std": float, "pairs": int}; JSON-able.

    Raises:
        SphereError: no finite matrix, or fewer than two non-zero rows.
    """
    counts = torch.zeros(bins, dtype=torch.float64)
    total = total_squared = 0.0
    for squared in _squared_distances(weight, NEAR_FLOAT32):
        cosine = 1 - 0.5 * squared
        counts += torch.histc(cosine.clamp(low, high), bins, low, high).cpu()
        total += float(cosine.sum())
        total_squared += float(cosine.square().sum())
    pairs = int(counts.sum())
    _check_pairs(pairs)
    mean = total / pairs
    return {
        "edges": torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist(),
        "counts": [int(count) for count in counts],
        "mean": mean,
        "std": math.sqrt(max(total_squared / pairs - mean * mean, 0.0)),
        "pairs": pairs,
    }


def _check_pairs(pairs: int) -> None:
    if pairs == 0:
        raise SphereError(
            "The weight has fewer than two non-zero rows: there is no pair of neurons to compare."
        )


def principal_share(delta: Tensor, basis: Tensor) -> float:
    """||Delta U||_F^2 / ||Delta||_F^2, the share of an update in the principal subspace (SPHERE, section 4).

    Args:
        delta: update (out x in).
        basis: U (in x r) with orthonormal columns, e.g. `principal_directions(W, beta_hse).basis`.

    Returns:
        In [0, 1]; 0.0 for a zero update.

    Raises:
        SphereError: shapes that do not fit.
    """
    if delta.ndim != 2 or basis.ndim != 2 or delta.shape[1] != basis.shape[0]:
        raise SphereError(
            f"The update {tuple(delta.shape)} (out x in) and the basis {tuple(basis.shape)} (in x r) do not fit."
        )
    work = torch.promote_types(torch.promote_types(delta.dtype, basis.dtype), torch.float32)
    return share_inside(delta.to(work) @ basis.to(work), delta)


def share_inside(inside: Tensor, delta: Tensor) -> float:
    """`principal_share` of an update (out x in), given Delta U (out x r)."""
    total = _norm(delta)
    return min((_norm(inside) / total) ** 2, 1.0) if total > 0 else 0.0


def rotation(reference: Tensor, basis: Tensor) -> float:
    """How far a subspace has turned away from a reference: 1 - ||U_0^T U||_F^2 / min(r_0, r), in [0, 1].

    The mean squared sine of the principal angles: 0 where the smaller subspace lies in the larger one, 1 where they are
    orthogonal. For the principal directions of an edited weight against those of the unedited one.

    Args:
        reference: U_0 (in x r_0), orthonormal columns.
        basis: U (in x r), orthonormal columns.
    """
    overlap = reference.double().T @ basis.double()  # r_0 x r
    return max(0.0, 1.0 - float(overlap.square().sum()) / min(overlap.shape))


def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value of W, from the Gram matrix of its smaller side; inf if rank-deficient.

    A float32 Gram carries the square of the condition number up to about 1e5; above, float64 is used, which in turn
    calls condition numbers above about 1e7 infinite.
    """
    weight = _checked(weight)
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    peak = float(weight.abs().max()) if weight.numel() else 0.0
    if peak == 0:
        return math.inf
    if not math.isfinite(peak):
        raise SphereError(NOT_FINITE)
    for dtype, trusted in ((weight.dtype, 1e5), (torch.float64, 1e14)):
        scaled = weight.to(dtype) / peak  # squares neither overflow nor vanish
        values = torch.linalg.eigvalsh(scaled @ scaled.T)  # ascending
        low, high = float(values[0]), float(values[-1])
        if low > 0 and high / low < trusted:
            return math.sqrt(high / low)
    return math.inf


def layer_report(
    weight: Tensor,
    before: Tensor,
    reference_energy: float,
    *,
    s: float = 1.0,
    basis: Tensor | None = None,
    condition: bool = True,
) -> dict[str, float | None]:
    """Figures of one edited weight for the per-batch log; every value is JSON-able.

    Args:
        weight: W (out x in) after the batch.
        before: W before the batch.
        reference_energy: `hyperspherical_energy` of the weight before all editing, with the same s.
        basis: U (in x r); adds the share of the change in the principal subspace.
        condition: whether to find the condition number, the most expensive of the figures.

    Returns:
        energy; energy_change, relative to `reference_energy`; delta_norm, the Frobenius norm of the batch's change;
        condition (None where infinite); principal_share with a basis.
    """
    delta = weight - before
    energy = hyperspherical_energy(weight, s)
    figures: dict[str, float | None] = {
        "energy": energy,
        "energy_change": _relative(energy, reference_energy),
        "delta_norm": _norm(delta),
    }
    if condition:
        number = condition_number(weight)
        figures["condition"] = number if math.isfinite(number) else None
    if basis is not None:
        figures["principal_share"] = principal_share(delta, basis)
    return figures


def _norm(matrix: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _checked(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise SphereError(NOT_FINITE)
    return weight if weight.dtype == torch.float64 else weight.detach().float()


def _squared_distances(weight: Tensor, near: float) -> Iterator[Tensor]:
    """Yield ||w_i - w_j||^2 of all pairs i < j of non-zero rows, block by block, each as a 1-D float64 tensor.

    Args:
        near: squared distance below which float32 is not trusted.
    """
    weight = _checked(weight)
    step = max(1, min(BLOCK_ROWS, BLOCK_ENTRIES // max(1, weight.shape[1])))
    parts = [
        torch.linalg.vector_norm(p, dim=1, keepdim=True, dtype=torch.float64) for p in weight.split(step)
    ]
    norms = torch.cat(parts)  # out x 1
    if not bool(torch.isfinite(norms).all()):
        raise SphereError(NOT_FINITE)
    present = norms[:, 0] >= ZERO_NORM
    if not bool(present.all()):
        weight, norms = weight[present], norms[present]
    starts = range(0, weight.shape[0], step)
    for i in starts:
        for j in starts[starts.index(i) :]:
            rows, columns = slice(i, i + step), slice(j, j + step)
            squared = _block(weight, norms, rows, columns, near)  # b x b'
            if i != j:
                yield squared.reshape(-1)
            elif squared.shape[0] > 1:
                b = squared.shape[0]
                i_upper, j_upper = torch.triu_indices(b, b, offset=1, device=squared.device)
                yield squared.reshape(-1)[i_upper * b + j_upper]


def _block(weight: Tensor, norms: Tensor, rows: slice, columns: slice, near: float) -> Tensor:
    """Squared distances (b x b', float64) between two blocks of rows, exact also for neighbours."""
    squared = _gram_distances(_unit(weight, norms, rows), _unit(weight, norms, columns))
    is_near = squared < near
    if weight.dtype != torch.float64:
        if rows == columns:
            is_near.fill_diagonal_(False)
        if int(is_near.sum()) > MANY_NEAR * squared.numel():
            wide = torch.float64
            squared = _gram_distances(_unit(weight, norms, rows, wide), _unit(weight, norms, columns, wide))
            is_near = squared < NEAR_FLOAT64
    else:
        is_near = squared < NEAR_FLOAT64
    if rows == columns:
        is_near = is_near.triu(1)  # the rest of a diagonal block is not read
    pairs = is_near.nonzero()
    chunk = max(1, BLOCK_ENTRIES // max(1, weight.shape[1]))
    for part in pairs.split(chunk):
        left, right = part.unbind(1)
        a = weight[rows][left].double() / norms[rows][left]  # pairs x in
        b = weight[columns][right].double() / norms[columns][right]
        squared[left, right] = (a - b).square().sum(1)
    return squared


def _unit(weight: Tensor, norms: Tensor, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
    """Normalised rows (b x in)."""
    part = weight[rows].to(dtype or weight.dtype)
    return part / norms[rows].to(part)


def _gram_distances(a: Tensor, b: Tensor) -> Tensor:
    """2 - 2 cos of unit rows, (b x b') in float64."""
    return (a @ b.T).double().mul_(-2).add_(2)
