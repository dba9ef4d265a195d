"""EMMET's and ENCORE's solves beside the dense ones, and that EMMET's constraint is met."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_sequential_solve import IN, WEIGHT, batches, moment, relative
from tiny_run import method_values

from benchmarks.plain import solves as plain
from sphere import SphereError, get_method, hparams_from_dict
from sphere.methods.sequential_solve import SequentialSolve, inverse_moment


@pytest.mark.parametrize("lambda_e", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("ridge", [0.0, 5.0])
@pytest.mark.parametrize("n", [1, 9])
def test_emmet_equals_the_dense_solve(n: int, ridge: float, lambda_e: float) -> None:
    (keys,) = batches(n, [n])
    solve = SequentialSolve(inverse_moment(moment(), WEIGHT, "layer 0", ridge), lambda_e, "layer 0")
    expected = plain.emmet(moment(), keys.double(), WEIGHT, ridge, lambda_e)
    assert relative(solve.solve(keys), expected) < 1e-8


def test_encore_equals_the_dense_solve() -> None:
    """In every batch of a run, on both sides of the change from S - B B^T to a matrix."""
    solve = SequentialSolve(inverse_moment(moment(), WEIGHT, "layer 0", 5.0), 1.0, "layer 0")
    cache = torch.zeros(IN, IN, dtype=torch.float64)
    for keys in batches(3, [6, 9, 9, 6]):
        assert relative(solve.solve(keys), plain.encore(moment(), keys.double(), cache, WEIGHT, 5.0)) < 1e-8
        solve.append(keys)
        solve.compact()
        cache += keys.double() @ keys.double().T


def test_emmet_is_least_of_the_updates_that_meet_the_constraint() -> None:
    """Delta K = R, and any other such update changes the preserved keys more."""
    (keys,) = batches(0, [5])
    residual = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solve = SequentialSolve(inverse_moment(moment(), WEIGHT, "layer 0"), 1e-10, "layer 0")
    delta = residual @ solve.solve(keys).T
    torch.testing.assert_close(delta @ keys.double(), residual, rtol=1e-6, atol=1e-6)
    other = residual @ torch.linalg.pinv(keys.double())
    torch.testing.assert_close(other @ keys.double(), residual)
    assert torch.trace(delta @ moment() @ delta.T) < 0.9 * torch.trace(other @ moment() @ other.T)


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("EMMET", {"lambda_e": 0.0}, "lambda_e must be positive"),
        ("EMMET", {"mom2_ridge": -1.0}, "mom2_ridge must not be negative"),
        ("ENCORE", {"mom2_ridge": -1.0}, "mom2_ridge must not be negative"),
        ("MEMIT", {"z_stop": -1}, "z_stop must not be negative"),
        ("AlphaEdit", {"z_stop_probability": 1.0}, r"z_stop_probability must be a probability in \(0, 1\)"),
    ],
)
def test_numbers_out_of_range_are_named(method: str, change: dict[str, Any], says: str) -> None:
    hparams = hparams_from_dict(method_values(method), get_method(method).hparams_class)
    with pytest.raises(SphereError, match=says):
        dataclasses.replace(hparams, **change)


def test_a_ridge_makes_a_singular_moment_solvable() -> None:
    singular = torch.zeros(IN, IN)
    with pytest.raises(SphereError, match="not positive definite"):
        inverse_moment(singular, WEIGHT, "layer 0")
    keys = torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(inverse_moment(singular, WEIGHT, "layer 0", 4.0)(keys), keys / 4)
