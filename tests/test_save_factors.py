"""Checkpoints as factors of the change: smaller, and the same weights for whatever reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPT2_MODULES, tiny_gpt2
from safetensors.torch import load_file
from tiny_run import TinyRun, contents
from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import list_checkpoints, read_weights
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.export import export_run
from sphere.factors import Factors
from sphere.low_rank import Decomposition, rounding_norm
from sphere.models import load_model
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with the same run twice: whole weights in "whole", factors in "factors"."""
    tiny = TinyRun(tmp_path_factory.mktemp("factors"), tiny_tokenizer, n_records=4)
    for output in ("whole", "factors"):
        made(tiny, output)
    return tiny


def made(tiny: TinyRun, output: str, **settings: Any) -> Path:
    """The folder of a run that keeps what its name says."""
    save = "weights" if output.startswith("whole") else "factors"
    return execute(tiny.config(output, save=save, **settings)).folder


def folders(world: TinyRun) -> tuple[Path, Path]:
    return folder_of(world.config("whole")), folder_of(world.config("factors"))


def assert_same(whole: Path, factored: Path, within: float) -> None:
    checkpoints = list_checkpoints(whole)
    assert [c.n_edits for c in list_checkpoints(factored)] == [c.n_edits for c in checkpoints]
    for one, other in zip(checkpoints, list_checkpoints(factored), strict=True):
        expected, found = read_weights(one.path), read_weights(other.path)
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            assert found[name].dtype == weight.dtype
            off = (found[name].float() - weight.float()).norm() / weight.float().norm()
            assert off <= within, (one.path.name, name)


def test_they_are_the_same_weights_in_less_space(world: TinyRun) -> None:
    whole, factored = folders(world)
    assert_same(whole, factored, 2e-7)
    small, large = (load_file(folder / "edit_4.safetensors") for folder in (factored, whole))
    assert {key.rpartition("/")[2] for key in small} == {"left", "right"}
    assert {tensor.shape[1] for tensor in small.values()} == {4}  # one for each edit
    assert sum(t.numel() for t in small.values()) < 0.25 * sum(t.numel() for t in large.values())
    assert contents(whole, "edit_0*") == contents(factored, "edit_0*")


def test_they_are_scored_and_exported_as_whole_ones(world: TinyRun, tmp_path: Path) -> None:
    rows = []
    for run in folders(world):
        model, tokenizer = load_model(str(world.model), device="cpu")
        records = execute(world.config(run.parents[2].name, continue_from_run=True)).records
        rows.append(evaluate_run(model, tokenizer, run, records)["checkpoints"])
    for one, other in zip(*rows, strict=True):
        assert other["metrics"]["efficacy_prob_diff"]["mean"] == pytest.approx(
            one["metrics"]["efficacy_prob_diff"]["mean"], rel=1e-3, abs=1e-3
        )
    export = export_run(folders(world)[1], "peft", tmp_path / "out")
    assert "rank 4" in export.made[0]


def test_of_a_bfloat16_model_they_hold_the_sum_of_the_updates(world: TinyRun) -> None:
    """A checkpoint is that sum, rounded once; here and there it rounds the other way."""
    whole, factored = (made(world, f"{kind}-half", dtype="bfloat16") for kind in ("whole", "factors"))
    assert_same(whole, factored, 1e-4)
    one, other = (read_weights(folder / "edit_4.safetensors") for folder in (whole, factored))
    assert all((one[name] == other[name]).float().mean() > 0.99 for name in one)
    assert any(key.endswith("/left") for key in load_file(factored / "edit_4.safetensors"))


def test_convolutions_keep_their_orientation(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 keeps its weights as (in x out)."""
    tiny = TinyRun(tmp_path, tiny_tokenizer, n_records=2)
    for path in tiny.model.iterdir():
        path.unlink()
    tiny_gpt2().save_pretrained(tiny.model)
    tiny_tokenizer.save_pretrained(tiny.model)
    tiny.write_hparams("MEMIT", **GPT2_MODULES)
    whole, factored = (made(tiny, kind, alg_name="MEMIT") for kind in ("whole", "factors"))
    assert_same(whole, factored, 2e-7)
    assert any(key.endswith("/left") for key in load_file(factored / "edit_2.safetensors"))


def test_changes_of_full_rank_are_kept_whole(world: TinyRun) -> None:
    folder = made(world, "factors", alg_name="MEMIT_rect", dataset_size_limit=2)
    assert not any("/" in key for key in load_file(folder / "edit_2.safetensors"))


def test_without_the_original_weights_the_sentence_says_what_is_missing(
    world: TinyRun, tmp_path: Path
) -> None:
    copy = world.copy(tmp_path / "copy")
    folder = folder_of(copy.config("factors"))
    (folder / "edit_0.safetensors").unlink()
    with pytest.raises(
        SphereError, match=r"holds the change of .*down_proj.*edit_0.safetensors: put the run's"
    ):
        read_weights(folder / "edit_4.safetensors")


def test_the_rank_of_a_change_is_read_above_its_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 70)
    change = Factors(0.1 * torch.randn(40, 5), torch.randn(70, 5))
    written = weight
    for column in range(5):  # five writes, each rounded
        written = written + change.delta([column]).float()
    found = Decomposition(written.double() - weight.double())
    assert found.exact_rank(5, rounding_norm(written, torch.float32, 5)) == 5
    assert found.exact_rank(3, rounding_norm(written, torch.float32, 5)) == 5  # more than was said
    assert found.error(5) < 1e-6 < found.error(4)
    torch.testing.assert_close(found.factors(5).delta(), change.delta(), atol=1e-5, rtol=0)
    assert Decomposition(torch.randn(40, 70)).exact_rank(5, 1e-3) is None
    nothing = Decomposition(torch.zeros(40, 70))
    assert nothing.exact_rank(5, 1e-3) == 0
    assert nothing.error(0) == 0
