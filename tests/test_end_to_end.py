"""The whole way on the real default model: edit the starter facts, score, read back, revert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import evaluate
from scripts import evaluate_each_epoch
from sphere.checkpoints import list_checkpoints, read_weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Ten facts in batches of five by AlphaEdit with SPHERE, on second moments of a part of the shipped text."""
    place = tmp_path_factory.mktemp("end_to_end")
    hparams = json.loads((ROOT / "hparams/AlphaEdit/SmolLM2-135M.json").read_text("utf-8"))
    path = place / "hparams/AlphaEdit/SmolLM2-135M.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(hparams | {"mom2_n_samples": 100}), "utf-8")
    flags = ["--dataset_size_limit=10", "--num_edits=5", "--device=cpu"]
    flags += [
        f"--hparams_dir={place / 'hparams'}",
        f"--stats_dir={place / 'stats'}",
        f"--output_dir={place / 'out'}",
    ]
    assert evaluate.main(flags) == 0
    return place / "out/AlphaEdit/SmolLM2-135M/starter_weight_data_batch_5_0.5_0.5"


def test_the_edits_hold_and_the_rest_stays(run_folder: Path) -> None:
    rows = json.loads((run_folder / "summary/summary.json").read_text("utf-8"))["checkpoints"]
    assert [row["n_edits"] for row in rows] == [0, 5, 10]
    before, after = rows[0]["metrics"], rows[-1]["metrics"]
    assert before["efficacy_success"]["mean"] == 0  # the starter set holds what the model knows
    assert after["efficacy_success"]["mean"] >= 90
    assert after["paraphrase_success"]["mean"] >= before["paraphrase_success"]["mean"] + 50
    assert after["neighborhood_success"]["mean"] >= before["neighborhood_success"]["mean"] - 15


def test_checkpoints_hold_the_edited_weights_only(run_folder: Path, default_model) -> None:
    model, _ = default_model
    checkpoints = list_checkpoints(run_folder)
    assert [c.n_edits for c in checkpoints] == [0, 5, 10]
    original, edited = read_weights(checkpoints[0].path), read_weights(checkpoints[-1].path)
    assert list(original) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4, 9)]
    for name, weight in original.items():
        assert torch.equal(weight, model.get_parameter(name))
        assert not torch.equal(weight, edited[name])


def test_scoring_again_changes_nothing(run_folder: Path, capsys) -> None:
    summary = run_folder / "summary/summary.json"
    before = json.loads(summary.read_text("utf-8"))
    assert (
        evaluate_each_epoch.main([f"--weight_folder={run_folder}", "--ds_name=starter", "--device=cpu"]) == 0
    )
    assert "edit_10" in capsys.readouterr().out
    assert json.loads(summary.read_text("utf-8"))["checkpoints"] == before["checkpoints"]
