"""The null-space projector as its thinner factor: against the dense one, and what must hold of any projector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.plain import solves as plain
from sphere import SphereError
from sphere.methods.null_space import Projector, null_space_projector

quick = settings(max_examples=30, deadline=None)


def moment(seed: int, size: int, null: int) -> Tensor:
    """E[k k^T] (in x in) float64 with `null` eigenvalues below 1e-2 and the others above 1."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    small = 1e-2 * torch.rand(null, generator=generator, dtype=torch.float64) ** 2
    large = 1 + torch.rand(size - null, generator=generator, dtype=torch.float64)
    return basis * torch.cat([small, large]) @ basis.T


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@quick
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(2, 24), share=st.floats(0.05, 1))
def test_projector(seed, size, share):
    """Equal to the dense P, symmetric, idempotent, blind to what it removes, and at most in / 2 thick."""
    null = max(1, int(size * share))
    second = moment(seed, size, null)
    projector = null_space_projector(second, 0.5)
    dense = projector.apply(torch.eye(size, dtype=torch.float64))
    assert projector.dim == null
    assert largest(dense - plain.projector(second, 0.5)) < 1e-5
    assert largest(dense - dense.T) < 1e-12
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    once = projector.apply(x)
    assert largest(projector.apply(once) - once) < 1e-5 * max(1, largest(x))
    assert largest(second @ once) < 0.011 * float(x.norm())  # what is left moves no preserved key
    assert projector.basis.shape[1] <= size / 2
    assert projector.basis.dtype == torch.float32
    assert projector.basis.is_contiguous()


@pytest.mark.parametrize("null", [3, 9])
def test_memory_is_at_most_half_of_a_dense_matrix(null):
    size = 12
    basis = null_space_projector(moment(0, size, null), 0.5).basis
    assert basis.untyped_storage().nbytes() <= size * size * 4 / 2


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_of_the_basis_add_up(complement, dtype, monkeypatch):
    basis = torch.linalg.qr(torch.randn(20, 7, generator=torch.Generator().manual_seed(1))).Q
    projector = Projector(basis, complement, 13 if complement else 7)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(2), dtype=dtype)
    whole = projector.apply(x)
    monkeypatch.setattr("sphere.methods.null_space.PIECE", 3)
    assert largest(projector.apply(x) - whole) < 1e-5
    assert whole.dtype == dtype


def test_apply_leaves_its_argument_alone():
    projector = null_space_projector(moment(3, 10, 8), 0.5)
    x = torch.ones(10, 2)
    projector.apply(x)
    assert torch.equal(x, torch.ones(10, 2))


def test_the_second_moment_is_left_alone():
    second = moment(4, 10, 5)
    before = second.clone()
    null_space_projector(second, 0.5)
    assert torch.equal(second, before)


def test_everything_null_is_the_identity(caplog):
    projector = null_space_projector(moment(5, 8, 8), 0.5)
    x = torch.randn(8, 2)
    assert torch.equal(projector.apply(x), x)
    assert "identity" in caplog.text


def test_nothing_null_is_an_error():
    with pytest.raises(SphereError, match="nullspace_threshold"):
        null_space_projector(moment(6, 8, 0) + torch.eye(8), 0.5)
