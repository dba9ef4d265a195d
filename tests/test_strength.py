"""SPHERE that sets its own strength: alpha by a budget, r by the noise; against plain searches, and in runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import TinyRun, contents, flags
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import sphere.runs.run
from benchmarks.plain import projection as plain
from sphere.commands import edit
from sphere.commands.common import config_of
from sphere.commands.sweep_job import job_of
from sphere.cuts import above_noise, noise_factor
from sphere.errors import SphereError
from sphere.projection import principal_directions, project_update
from sphere.report.collect import load_runs
from sphere.report.tables import overview
from sphere.rules import Random, Sphere
from sphere.runs.config import RunConfig, command_of
from sphere.runs.plan import plan_run
from sphere.runs.resolve import alpha_budget_of, alpha_of, beta_hse_of, folder_of
from sphere.runs.run import execute

STEPS = 40  # of the plain search


def matrix(seed: int, out: int = 6, in_features: int = 10) -> Tensor:
    """Random and reproducible, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, in_features, generator=generator, dtype=torch.float64)


def auto(budget: float, original: Tensor, beta_hse: float = 0.5, directions: str = "current") -> Sphere:
    return Sphere(beta_hse, "auto", directions, budget).for_weight("w", original)


# ---- alpha ----


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    out=st.integers(2, 9),
    in_features=st.integers(2, 9),
    edited=st.sampled_from((0.0, 0.1, 0.5)),
    back=st.booleans(),
    budget=st.floats(0.0, 0.8),
)
def test_alpha_is_the_smallest_within_the_budget(seed, out, in_features, edited, back, budget) -> None:
    """Also where the edits so far are over the budget, and where the update takes some of them back."""
    original, step = matrix(seed, out, in_features), matrix(seed + 1, out, in_features)
    weight = original + edited * step
    delta = -0.7 * edited * step if back and edited else 0.3 * matrix(seed + 2, out, in_features)
    directions = principal_directions(weight, 0.5)
    kept, metrics = auto(budget, original).apply(delta, weight)
    alpha, others = metrics["alpha"], (delta, weight, original, directions.basis)
    expected = plain.smallest_alpha(budget, *others, STEPS)
    assert 0 <= alpha <= 1
    assert abs(alpha - expected) <= 1 / STEPS + 1e-6
    assert metrics["principal_change"] <= max(budget, plain.principal_change(*others, expected)) + 1e-7
    assert metrics["principal_change"] == pytest.approx(plain.principal_change(*others, alpha), abs=1e-7)
    torch.testing.assert_close(kept, project_update(delta, weight, 0.5, alpha))


def test_the_ends_of_the_budget() -> None:
    original, delta = matrix(0), matrix(1)
    assert auto(math.inf, original).apply(delta, original)[1]["alpha"] == 0
    kept, metrics = auto(0.0, original).apply(delta, original)
    assert (metrics["alpha"], metrics["principal_change"]) == (1.0, 0.0)
    torch.testing.assert_close(kept, project_update(delta, original, 0.5, 1.0))
    assert auto(0.0, original).apply(0 * delta, original)[1]["alpha"] == 0  # nothing to take away


def test_a_larger_budget_asks_for_less_and_scale_for_nothing() -> None:
    """Relative and free of units: a model's scale, or that of single neurons, changes no alpha."""
    original, delta = matrix(0), 0.3 * matrix(1)
    alphas = [
        auto(budget, original).apply(delta, original)[1]["alpha"] for budget in (0.001, 0.003, 0.01, 0.03)
    ]
    assert alphas == sorted(alphas, reverse=True)
    assert len(set(alphas)) == 4
    scale = torch.linspace(0.01, 100, 6, dtype=torch.float64)[:, None]
    found = auto(0.003, scale * original).apply(scale * delta, scale * original)[1]["alpha"]
    assert found == pytest.approx(alphas[1], abs=1e-6)


def test_the_budget_is_of_the_whole_run() -> None:
    """Batch after batch, with the directions of the unedited weight, never more than the budget."""
    original = matrix(0, 8, 16)
    weight, rule = original.clone(), auto(0.02, original, directions="original")
    norms, basis = original.norm(dim=1, keepdim=True), principal_directions(original, 0.5).basis
    alphas, changes = [], []
    for seed in range(1, 9):
        kept, metrics = rule.apply(0.1 * matrix(seed, 8, 16), weight)
        weight = weight + kept
        alphas.append(metrics["alpha"])
        changes.append(metrics["principal_change"])
    assert alphas[0] == 0
    assert max(alphas) > 0
    assert max(changes) == pytest.approx(0.02)
    assert float(((weight - original) / norms @ basis).norm() / (original / norms @ basis).norm()) ** 2 < 0.04


def test_the_control_takes_away_what_sphere_would() -> None:
    original, delta = matrix(0, 12, 40), 0.3 * matrix(1, 12, 40)
    metrics = auto(0.003, original).apply(delta, original)[1]
    control = Random(0.5, "auto", budget=0.003).for_weight("w", original).apply(delta, original)[1]
    assert control["alpha"] == metrics["alpha"]
    assert 0 < control["alpha"] < 1


def test_what_cannot_be() -> None:
    for alpha in (-0.1, 1.1, math.nan, "automatic"):
        with pytest.raises(SphereError, match="alpha is a suppression strength from 0 to 1, or 'auto'"):
            Sphere(0.5, alpha)
    for beta in (1.5, "some"):
        with pytest.raises(SphereError, match="beta_hse is a cumulative ratio between 0 and 1, or 'auto'"):
            Sphere(beta, 0.5)
    for budget in (-0.1, math.nan):
        with pytest.raises(SphereError, match="alpha_budget is a fraction of the principal part"):
            Sphere(0.5, "auto", budget=budget)
    with pytest.raises(SphereError, match="for_weight"):
        Sphere(0.5, "auto").apply(matrix(0), matrix(1))
    with pytest.raises(SphereError, match="needs the unedited weight"):
        project_update(matrix(0), matrix(1), 0.5, "auto")


# ---- r ----


def test_the_factor_is_the_published_one() -> None:
    """Gavish and Donoho 2014: omega(1) = 2.858, and their polynomial, good to 0.02."""
    assert noise_factor(1.0) == pytest.approx(2.858, abs=5e-4)
    for aspect in (0.05, 0.2, 0.375, 0.6, 0.9):
        polynomial = 0.56 * aspect**3 - 0.95 * aspect**2 + 1.82 * aspect + 1.43
        assert noise_factor(aspect) == pytest.approx(polynomial, abs=0.02)


@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (80, 80)])
def test_r_is_the_rank_of_a_signal_in_noise(shape: tuple[int, int]) -> None:
    """White noise: all rows have about the same part of the signal, so that unit rows leave it white."""
    noise = matrix(0, *shape)
    left = torch.nn.functional.normalize(matrix(1, shape[0], 4), dim=1)
    right = torch.linalg.qr(matrix(2, shape[1], 4)).Q.T * shape[1] ** 0.5
    assert principal_directions(noise, "auto").rank == 1  # at least one, as published
    weight = noise + 1.5 * left @ right
    found = principal_directions(weight, "auto")
    assert found.rank == 4
    torch.testing.assert_close(found.basis, principal_directions(weight, found.fraction - 1e-9).basis)
    assert principal_directions(7 * weight, "auto").rank == 4
    assert principal_directions(weight.float(), "auto").rank == 4


def test_r_is_counted_anew_where_rounding_could_decide() -> None:
    """The distance to another number is told, by which `leading_eigenvectors` goes to float64."""
    shape = (3, 30)
    factor = noise_factor(0.1) ** 2
    near = torch.tensor([factor + 1e-9, 1.0, 0.5], dtype=torch.float64)
    assert above_noise(near, shape) == (1, pytest.approx(1e-9 / factor, rel=1e-3))
    values = torch.tensor([3 * factor, 1.5 * factor, 1.0, 0.5, 0.1]).double()
    assert above_noise(values, shape)[0] == 2
    assert above_noise(values.where(values > 1, torch.zeros(()).double()), shape)[0] == 2  # no noise at all


# ---- in runs ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("auto"), tiny_tokenizer, 6)


AUTO = {"alpha": "auto", "beta_hse": "auto"}


@pytest.mark.parametrize(
    "chosen",
    [
        {"alg_name": "AlphaEdit", "rules": "rect,sphere", "directions": "original"},
        {"alg_name": "MEMIT_prune"},
    ],
    ids=lambda chosen: chosen["alg_name"],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    chosen: dict[str, str], tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**AUTO, "alpha_budget": 1e-4, "log_energy_every": 1, **chosen}
    whole = execute(tiny.config("whole", **config))
    for line in (whole.folder / "batches.jsonl").read_text().splitlines():
        for metrics in json.loads(line)["layers"].values():
            assert metrics["rank"] >= 1
            assert 0 <= metrics["alpha"] <= 1
    assert "budget_0.0001" in whole.folder.name
    write = sphere.runs.run.write_resume

    def killed(folder: Path, *state: object) -> int:
        write(folder, *state)
        raise KeyboardInterrupt

    parts = {**config, "output_dir": str(tiny.folder / "parts")}
    with monkeypatch.context() as patch:
        patch.setattr(sphere.runs.run, "write_resume", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(tiny.config(**parts))
    ended = execute(tiny.config(**parts, continue_from_run=True))
    assert contents(ended.folder) == contents(whole.folder)
    other = json.loads((ended.folder / "run.json").read_text()) | {"alpha_budget": 0.02}
    (ended.folder / "run.json").write_text(json.dumps(other))
    with pytest.raises(SphereError, match="begun with other settings"):
        execute(tiny.config(**parts, continue_from_run=True))


def test_the_report_says_what_was_chosen(tiny: TinyRun) -> None:
    run = execute(tiny.config("reported", alg_name="MEMIT", **AUTO))
    table = overview(load_runs([run.folder]))
    shown = dict(zip(table.lines[0], table.lines[1], strict=True))
    assert shown["β"].startswith("auto (1")
    assert shown["α"].startswith("auto (0.")
    assert run.folder.name == "starter_weight_data_batch_2_auto_auto"
    assert plan_run(tiny.config(**AUTO)).items


def test_auto_as_a_flag_in_a_file_and_in_a_sweep(tiny: TinyRun) -> None:
    words = [*flags(tiny.places), "--alpha=auto", "--beta_hse=auto", "--alpha_budget=0.2"]
    config = config_of(edit.parser().parse_args(words))
    assert (alpha_of(config), beta_hse_of(config), alpha_budget_of(config)) == ("auto", "auto", 0.2)
    assert "--beta_hse=auto --alpha=auto --alpha_budget=0.2" in command_of(vars(config))
    path = tiny.write_hparams("MEMIT", alpha="auto", alpha_budget=0.3, cumulative_ratio="auto")
    try:
        own = tiny.config(alg_name="MEMIT")
        assert (alpha_of(own), beta_hse_of(own), alpha_budget_of(own)) == ("auto", "auto", 0.3)
        assert folder_of(own).name.endswith("_auto_auto_budget_0.3")
        assert plan_run(own).items
    finally:
        path.unlink()
        tiny.write_hparams("MEMIT")
    sweep = {"sweep_dir": "x", "generation_interval": 0, "devices": []}
    jobs = [job_of(sweep | {"alpha": value}).config.alpha for value in ("auto", "0.5", 0, 0.8)]
    assert jobs == ["auto", 0.5, 0.0, 0.8]
    assert all(not isinstance(value, int) for value in jobs)


def test_bad_values_are_one_sentence(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edit.parser().parse_args(["--alpha=automatic"])
    assert "argument --alpha: expected a number or auto, got 'automatic'" in capsys.readouterr().err
    with pytest.raises(SphereError, match="beta_hse is a number or auto, got 'much'"):
        RunConfig(beta_hse="much").check()  # type: ignore[arg-type]
    with pytest.raises(SphereError, match="alpha_budget is a fraction"):
        RunConfig(alpha_budget=-1).check()
    for content in ({"alpha": "much"}, {"alpha_budget": "auto"}):
        path = tiny.write_hparams("ROME", **content)
        with pytest.raises(SphereError, match=f"{next(iter(content))} must be a number"):
            plan_run(tiny.config(alg_name="ROME"))
        path.unlink()
    tiny.write_hparams("ROME")
