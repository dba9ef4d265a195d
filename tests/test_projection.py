"""The SPHERE projection: against the in x in eigendecomposition, and what must hold of any projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.plain import projection as plain
from sphere import SphereError, principal_directions, project_update
from sphere.linalg import UnitRowsGram, orthonormal_rows

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 7), (7, 1), (150, 300), (300, 150)]
quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 24)
betas = st.floats(0.01, 0.999)


def matrix(
    seed: int, out: int, inp: int, dtype: torch.dtype = torch.float64, rank: int | None = None
) -> Tensor:
    """(out x in) with a decaying spectrum, so that directions are distinct; of lower rank where wanted."""
    generator = torch.Generator().manual_seed(seed)
    inner = min(out, inp) if rank is None else rank
    left = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, inp, generator=generator, dtype=torch.float64)
    return (left * 0.9 ** torch.arange(inner) @ right).to(dtype)


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@quick
@given(seed=seeds, out=sizes, inp=sizes, beta=betas)
def test_equals_the_plain_projection(seed, out, inp, beta):
    weight, delta = matrix(seed, out, inp), matrix(seed + 1, out, inp)
    expected = plain.principal_directions(weight, beta)
    found = principal_directions(weight, beta)
    assert found.rank == expected.shape[1]
    # A direction may be turned where two eigenvalues meet at the border; the updates are compared where none do.
    values = torch.linalg.svdvals(weight / (weight.norm(dim=1, keepdim=True) + 1e-8)).square()
    if found.rank < len(values) and values[found.rank - 1] - values[found.rank] < 1e-6 * values[0]:
        return
    assert largest(found.basis @ found.basis.T - expected @ expected.T) < 1e-6
    difference = project_update(delta, weight, beta, 0.7) - plain.project_update(delta, weight, beta, 0.7)
    assert largest(difference) < 1e-6 * largest(delta)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9])
def test_float32_has_the_rank_of_float64(shape, beta):
    weight = matrix(0, *shape, dtype=torch.float32)
    expected = plain.principal_directions(weight.double(), beta)
    found = principal_directions(weight, beta)
    assert found.basis.dtype == torch.float32
    assert found.rank == expected.shape[1]
    assert largest(found.basis.double() @ found.basis.double().T - expected @ expected.T) < 1e-3


@quick
@given(seed=seeds, at=st.integers(0, 9))
def test_rank_is_exact_where_rounding_could_decide_it(seed, at):
    """beta_hse within float32's rounding of a cumulative sum, on either side of it."""
    weight = matrix(seed, 12, 40, dtype=torch.float32)
    normed = weight.double() / (weight.double().norm(dim=1, keepdim=True) + 1e-8)
    ratio = torch.linalg.svdvals(normed).square().cumsum(0)
    ratio = ratio / ratio[-1]
    for shift in (-1e-9, 1e-9):
        beta = float(ratio[at]) + shift
        assert principal_directions(weight, beta).rank == int((ratio <= beta).sum()) + 1


@pytest.mark.parametrize("rank", [None, 20])
@pytest.mark.parametrize("common", [0.0, 5.0])
def test_float32_spectra_are_as_exact_as_the_check_supposes(rank, common):
    """Also where one direction dominates (neurons that share a mean), and where W lacks ranks."""
    mean = torch.randn(1, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = (matrix(0, 60, 150, rank=rank) + common * mean).float()
    ratios, bound = [], 0.0
    for precision in (torch.float64, torch.float32):
        neurons = UnitRowsGram(weight, precision)
        values, bound = neurons.spectrum()[0], neurons.rounding
        ratios.append(values.cumsum(0) / values.sum())
    assert largest(ratios[1] - ratios[0]) < bound


@quick
@given(seed=seeds, out=sizes, inp=sizes, beta=betas)
def test_directions_are_orthonormal_and_projecting_twice_changes_nothing(seed, out, inp, beta):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        weight, delta = matrix(seed, out, inp, dtype), matrix(seed + 1, out, inp, dtype)
        basis = principal_directions(weight, beta).basis
        assert largest(basis.T @ basis - torch.eye(basis.shape[1])) < tolerance
        once = project_update(delta, weight, beta, 1.0)
        assert largest(project_update(once, weight, beta, 1.0) - once) < tolerance * max(1, largest(delta))
        assert largest(once @ basis) < tolerance * max(1, float(delta.norm()))


@quick
@given(seed=seeds, out=sizes, inp=sizes, beta=betas, alpha=st.floats(0, 1))
def test_alpha_scales_what_is_taken_away(seed, out, inp, beta, alpha):
    weight, delta = matrix(seed, out, inp), matrix(seed + 1, out, inp)
    whole = delta - project_update(delta, weight, beta, 1.0)
    part = delta - project_update(delta, weight, beta, alpha)
    assert largest(part - alpha * whole) < 1e-9 * max(1, largest(delta))
    assert torch.equal(project_update(delta, weight, beta, 0.0), delta)


@quick
@given(seed=seeds, out=st.integers(2, 16), inp=st.integers(2, 16), beta=betas)
def test_scaling_rows_changes_no_direction(seed, out, inp, beta):
    """Neurons are compared on the sphere: their lengths do not matter (beyond the 1e-8 of the norm)."""
    weight = matrix(seed, out, inp)
    scale = 10 ** torch.linspace(0, 3, out, dtype=torch.float64)[:, None]
    found, expected = principal_directions(weight * scale, beta), principal_directions(weight, beta)
    assert abs(found.rank - expected.rank) <= 1  # 1e-8 may decide a tie
    if found.rank == expected.rank:
        assert largest(found.basis @ found.basis.T - expected.basis @ expected.basis.T) < 1e-3


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_more_directions_than_the_rank(shape, dtype):
    weight = matrix(3, *shape, dtype=dtype, rank=5)
    for beta in (1.0, 1 - 1e-9, 0.999999):
        found = principal_directions(weight, beta)
        assert found.rank <= 5
        assert torch.isfinite(found.basis).all()
    found = principal_directions(weight, 1.0)
    assert found.rank == 5
    assert found.fraction == pytest.approx(1)
    delta = weight.double() @ matrix(4, shape[1], shape[1])
    inside = delta @ found.basis.double()
    kept = project_update(delta, weight, 1.0, 1.0)
    assert largest(kept + inside @ found.basis.double().T - delta) < 1e-4 * largest(delta)


def test_the_whole_spectrum_is_resolved_in_float32():
    """Singular values down to 1e-5 of the largest count, though their squares are below float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linalg.qr(torch.randn(40, 10, generator=generator, dtype=torch.float64)).Q.T
    rows = torch.eye(10, dtype=torch.float64) * 1e-4 + 1 / 10**0.5  # rows close to one direction
    weight = (rows @ spread).float()
    assert principal_directions(weight, 1.0).rank == 10
    assert principal_directions(weight, 1.0).rank == plain.principal_directions(weight.double(), 1.0).shape[1]


def test_zero_rows_are_neurons_without_direction():
    weight = matrix(5, 12, 20)
    padded = torch.cat([weight, torch.zeros(4, 20, dtype=torch.float64)])[torch.randperm(16)]
    expected, found = principal_directions(weight, 0.6), principal_directions(padded, 0.6)
    assert found.rank == expected.rank
    assert largest(found.basis @ found.basis.T - expected.basis @ expected.basis.T) < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_directions(dtype):
    weight = matrix(6, 20, 30).to(dtype)
    found, expected = principal_directions(weight, 0.5), principal_directions(weight.float(), 0.5)
    assert found.basis.dtype == torch.float32
    assert torch.equal(found.basis, expected.basis)


def test_beta_zero_returns_the_update_itself():
    delta = matrix(7, 4, 6)
    assert project_update(delta, matrix(8, 4, 6), 0, 1.0) is delta


def test_an_update_keeps_its_dtype():
    weight = matrix(9, 8, 12, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64):
        assert project_update(matrix(10, 8, 12, dtype=dtype), weight, 0.5, 0.5).dtype == dtype


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-2, 0.5])
def test_orthonormal_rows(noise):
    generator = torch.Generator().manual_seed(11)
    rows = torch.linalg.qr(torch.randn(30, 6, generator=generator, dtype=torch.float64)).Q.T.contiguous()
    mixed = rows + noise * torch.randn(6, 6, generator=generator, dtype=torch.float64) @ rows
    found = orthonormal_rows(mixed.clone())
    assert largest(found @ found.T - torch.eye(6)) < 1e-12
    assert largest(found.T @ found - rows.T @ rows) < 1e-10


@pytest.mark.parametrize(
    ("weight", "beta", "said"),
    [
        (torch.zeros(3, 4), 0.5, "zero"),
        (torch.full((3, 4), float("nan")), 0.5, "finite"),
        (torch.full((3, 4), float("inf")), 0.5, "finite"),
        (torch.ones(4), 0.5, "matrix"),
        (torch.ones(0, 4), 0.5, "matrix"),
        (torch.ones(3, 4), 1.5, "beta_hse"),
        (torch.ones(3, 4), -0.1, "beta_hse"),
    ],
)
def test_errors_name_what_is_wrong(weight, beta, said):
    with pytest.raises(SphereError, match=said):
        principal_directions(weight, beta)


def test_update_and_weight_must_agree():
    with pytest.raises(SphereError, match="shape"):
        project_update(torch.ones(3, 4), torch.ones(4, 3), 0.5, 0.5)
    with pytest.raises(SphereError, match="alpha"):
        project_update(torch.ones(3, 4), torch.ones(3, 4), 0.5, 1.5)
