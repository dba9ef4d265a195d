"""Each update rule against its equation, on small matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.errors import SphereError
from sphere.linalg import thin_svd
from sphere.projection import principal_directions, project_update
from sphere.rules import Random, Revive, Sphere


def matrix(seed: int, out: int = 6, in_features: int = 10) -> torch.Tensor:
    """Random and reproducible, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, in_features, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000), out=st.integers(2, 9), in_features=st.integers(2, 9), tau=st.floats(0, 0.99)
)
def test_revive_filters_both_sides_of_the_unedited_weight(seed, out, in_features, tau) -> None:
    original, delta = matrix(seed, out, in_features), matrix(seed + 1, out, in_features)
    u, s, vh = torch.linalg.svd(original, full_matrices=False)
    k = next(n for n in range(1, len(s) + 1) if float(s[:n].sum()) > tau * float(s.sum()) or n == len(s))
    left = torch.eye(out, dtype=torch.float64) - u[:, :k] @ u[:, :k].T
    right = torch.eye(in_features, dtype=torch.float64) - vh[:k].T @ vh[:k]
    found, metrics = Revive(tau).for_weight("w", original).apply(delta, matrix(seed + 2, out, in_features))
    assert metrics["revive_rank"] == k
    torch.testing.assert_close(found, left @ delta @ right, rtol=0, atol=1e-6)


def test_revive_needs_the_unedited_weight() -> None:
    with pytest.raises(SphereError, match="for_weight"):
        Revive(0.5).apply(matrix(0), matrix(1))
    with pytest.raises(SphereError, match="tau"):
        Revive(1.0)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_thin_svd(shape) -> None:
    weight = matrix(3, *shape)
    u, s, v = thin_svd(weight)
    torch.testing.assert_close((u * s) @ v.T, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight), rtol=1e-9, atol=1e-12)
    assert [u.shape, v.shape] == [(shape[0], min(shape)), (shape[1], min(shape))]


def test_sphere_with_the_directions_of_the_unedited_weight() -> None:
    original, now, delta = matrix(0), matrix(1), matrix(2)
    as_published = Sphere(0.5, 0.8).for_weight("w", original).apply(delta, now)[0]
    torch.testing.assert_close(as_published, project_update(delta, now, 0.5, 0.8))
    fixed = Sphere(0.5, 0.8, "original").for_weight("w", original).apply(delta, now)[0]
    torch.testing.assert_close(fixed, project_update(delta, original, 0.5, 0.8))
    with pytest.raises(SphereError, match="directions"):
        Sphere(0.5, 0.8, "first")


def test_random_takes_away_as_much_as_sphere_elsewhere() -> None:
    weight, delta = matrix(0, 12, 40), matrix(1, 12, 40)
    basis = principal_directions(weight, 0.5).basis
    rule = Random(0.5, 0.3).for_weight("w", weight)
    found, metrics = rule.apply(delta, weight)
    removed = 0.3 * (delta @ basis).norm()
    assert metrics["removed"] == pytest.approx(1)
    assert float((delta - found).norm()) == pytest.approx(float(removed))
    assert torch.linalg.matrix_rank(delta - found) == metrics["rank"] == basis.shape[1]
    assert torch.equal(found, rule.apply(delta, weight)[0])  # drawn once
    other = Random(0.5, 0.3).for_weight("v", weight).apply(delta, weight)[0]
    assert not torch.allclose(found, other)


def test_random_takes_no_more_than_there_is() -> None:
    weight = matrix(0, 12, 40)
    inside = matrix(1, 12, 12)
    basis = principal_directions(weight, 0.5).basis
    delta = inside[:, : basis.shape[1]] @ basis.T  # all of it principal
    found, metrics = Random(0.5, 1.0).for_weight("w", weight).apply(delta, weight)
    assert metrics["removed"] < 1
    assert float(found.norm()) < float(delta.norm())
