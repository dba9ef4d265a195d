"""Hyperspherical measures against plain float64 definitions, and their conventions for odd rows."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere import hypersphere
from sphere.errors import SphereError
from sphere.hypersphere import (
    DISTANCE_EPS,
    condition_number,
    cosine_distribution,
    energy_change,
    hyperspherical_energy,
    layer_report,
    principal_share,
    uniformity,
)


def distances(weight):
    """All ||w_i - w_j||, i != j, of non-zero normalised rows, by the definition in float64."""
    weight = weight.double()
    weight = weight[weight.norm(dim=1) > 0]
    unit = weight / weight.norm(dim=1, keepdim=True)
    gaps = (unit[:, None, :] - unit[None, :, :]).norm(dim=2)
    return gaps[~torch.eye(len(unit), dtype=torch.bool)].clamp(min=DISTANCE_EPS)


def plain_energy(weight, s):
    gaps = distances(weight)
    return float(-gaps.log().sum() if s == 0 else gaps.pow(-s).sum())


def matrix(rows, columns, seed, kind="spread"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "crowded":
        weight = torch.randn(1, columns, generator=generator) + 1e-3 * weight
    elif kind == "pairs":
        weight = torch.cat([weight, 3 * weight + 1e-5 * torch.randn(weight.shape, generator=generator)])
    elif kind == "duplicates":
        weight = torch.cat([weight, weight[: rows // 2], torch.zeros(2, columns)])
    return weight


KINDS = ("spread", "crowded", "pairs", "duplicates")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [0, 0.5, 1, 2, 4])
def test_energy_matches_float64(kind, s):
    weight = matrix(40, 96, 0, kind)
    if kind == "duplicates" and s > 0:
        # Duplicates count 1 / eps^s; which of them are exactly equal after rounding does not matter for the sum.
        weight = weight[:40]
    assert hyperspherical_energy(weight, s) == pytest.approx(plain_energy(weight, s), rel=1e-5)


@given(
    rows=st.integers(2, 30),
    columns=st.integers(2, 20),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS[:3]),
    s=st.sampled_from([0.3, 1.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_energy_properties(rows, columns, seed, kind, s):
    weight = matrix(rows, columns, seed, kind)
    energy = hyperspherical_energy(weight, s)
    assert energy == pytest.approx(plain_energy(weight, s), rel=1e-5)
    scales = torch.logspace(-3, 3, len(weight), dtype=torch.float64)[:, None]
    turn = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64)).Q
    exact = weight.double()
    assert hyperspherical_energy(exact.flip(0), s) == pytest.approx(energy, rel=1e-5)  # order
    assert hyperspherical_energy(exact * scales, s) == pytest.approx(energy, rel=1e-5)  # row lengths
    assert hyperspherical_energy(exact @ turn, s) == pytest.approx(energy, rel=1e-5)  # rotation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_blocks_and_dtypes_agree_with_the_definition(monkeypatch, dtype):
    monkeypatch.setattr(hypersphere, "BLOCK_ROWS", 7)
    monkeypatch.setattr(hypersphere, "BLOCK_ENTRIES", 100)
    weight = matrix(20, 12, 3, "pairs").to(dtype)
    weight[5] = 0
    for s in (0, 1):
        assert hyperspherical_energy(weight, s) == pytest.approx(plain_energy(weight, s), rel=1e-5)
    gaps = distances(weight)
    assert uniformity(weight) == pytest.approx(float((-2 * gaps**2).exp().mean().log()), rel=1e-5)
    assert cosine_distribution(weight)["mean"] == pytest.approx(float((1 - gaps**2 / 2).mean()), rel=1e-5)


def test_zero_rows_are_left_out():
    weight = matrix(12, 8, 1)
    with_zeros = torch.cat([weight, torch.zeros(3, 8)])
    for measure in (hyperspherical_energy, uniformity):
        assert measure(with_zeros) == pytest.approx(measure(weight), rel=1e-12)
    assert cosine_distribution(with_zeros)["pairs"] == 12 * 11 // 2


def test_duplicate_rows_count_as_the_smallest_distance():
    weight = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert hyperspherical_energy(weight) == pytest.approx(2 / DISTANCE_EPS)
    assert hyperspherical_energy(weight, 0) == pytest.approx(-2 * math.log(DISTANCE_EPS))
    assert math.isfinite(hyperspherical_energy(matrix(20, 8, 2, "duplicates"), 2.0))


def test_few_rows_have_no_energy_and_no_distribution():
    for weight in (torch.zeros(4, 3), torch.ones(1, 3)):
        assert hyperspherical_energy(weight) == 0.0
        for measure in (uniformity, cosine_distribution):
            with pytest.raises(SphereError, match="fewer than two non-zero rows"):
                measure(weight)
        with pytest.raises(SphereError, match="no hyperspherical energy"):
            energy_change(weight, weight)


def test_energy_change_is_relative_and_exact_for_small_changes():
    reference = matrix(60, 200, 4)
    weight = reference + 1e-3 * matrix(60, 200, 5)
    expected = plain_energy(weight, 1) / plain_energy(reference, 1) - 1
    assert energy_change(weight, reference) == pytest.approx(expected, abs=1e-8)
    assert energy_change(reference, reference) == 0.0


def test_regular_arrangements():
    simplex = torch.eye(5) - 0.2  # d^2 = 2 + 2/4 between all
    assert hyperspherical_energy(simplex) == pytest.approx(20 / math.sqrt(2.5), rel=1e-6)
    histogram = cosine_distribution(torch.eye(6), bins=4)
    assert histogram["counts"] == [0, 0, 15, 0]
    assert histogram["std"] == pytest.approx(0, abs=1e-6)
    assert cosine_distribution(torch.eye(6), bins=2, low=0.5)["counts"] == [15, 0]  # outside: outermost bin
    assert uniformity(torch.eye(6)) == pytest.approx(-4, abs=1e-6)


@given(rows=st.integers(1, 12), columns=st.integers(2, 12), seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_principal_share(rows, columns, seed, data):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, columns, generator=generator)
    r = data.draw(st.integers(1, columns))
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q[:, :r]
    share = principal_share(delta, basis)
    assert 0 <= share <= 1
    inside = delta @ basis @ basis.T
    assert principal_share(inside, basis) == pytest.approx(1, abs=1e-4)
    assert share == pytest.approx(float(inside.square().sum() / delta.square().sum()), abs=1e-4)
    assert principal_share(torch.zeros_like(delta), basis) == 0


@given(rows=st.integers(1, 15), columns=st.integers(1, 15), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_condition_number(rows, columns, seed):
    weight = matrix(rows, columns, seed)
    values = torch.linalg.svdvals(weight.double())
    assert condition_number(weight) == pytest.approx(float(values[0] / values[-1]), rel=1e-2)


def test_condition_number_of_singular_weights():
    assert condition_number(torch.zeros(3, 4)) == math.inf
    assert condition_number(torch.ones(3, 4)) == math.inf
    assert condition_number(torch.diag(torch.tensor([1e4, 1.0]))) == pytest.approx(1e4, rel=1e-3)
    assert condition_number(1e30 * torch.eye(3)) == pytest.approx(1)


def test_layer_report_is_json():
    before, change = matrix(16, 24, 6), 0.01 * matrix(16, 24, 7)
    after = before + change
    basis = torch.linalg.qr(matrix(24, 24, 8)).Q[:, :3]
    figures = layer_report(after, before, hyperspherical_energy(before), basis=basis)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["energy_change"] == pytest.approx(energy_change(after, before), rel=1e-6)
    assert figures["delta_norm"] == pytest.approx(float(change.norm()), rel=1e-4)
    assert figures["principal_share"] == pytest.approx(principal_share(change, basis), rel=1e-3)
    assert figures["condition"] == pytest.approx(condition_number(after))
    bare = layer_report(torch.ones(16, 24), before, 1.0, condition=False)
    assert set(bare) == {"energy", "energy_change", "delta_norm"}
    assert layer_report(torch.ones(16, 24), before, 1.0)["condition"] is None


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: hyperspherical_energy(torch.ones(3)), "finite"),
        (lambda: hyperspherical_energy(torch.full((2, 2), math.nan)), "finite"),
        (lambda: condition_number(torch.full((2, 2), math.inf)), "finite"),
        (lambda: hyperspherical_energy(torch.ones(2, 2, dtype=torch.long)), "finite"),
        (lambda: hyperspherical_energy(torch.ones(2, 2), -1), "must be 0 or larger, got -1"),
        (lambda: hyperspherical_energy(torch.ones(2, 2), 200), "exceeds float64"),
        (lambda: uniformity(torch.ones(2, 2), 0), "must be positive"),
        (lambda: energy_change(torch.ones(2, 2), torch.ones(3, 2)), "own earlier state"),
        (lambda: principal_share(torch.ones(2, 3), torch.ones(4, 1)), "do not fit"),
    ],
)
def test_bad_input_gives_one_sentence(call, words):
    with pytest.raises(SphereError, match=words):
        call()
