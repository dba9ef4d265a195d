"""Runs that commit b56ec0f wrote, rebuilt from its formats: listed, read, reported, scored, continued, replaced.

The names, keys and digests here are as that commit wrote them; only the places and the weights are this test's own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import TinyRun, contents
from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import list_checkpoints, read_config
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.models import load_model
from sphere.report import make_report
from sphere.report.collect import load_run
from sphere.runs.config import RunConfig
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute

HPARAMS = {
    "layers": [1, 2],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "num_steps": 3,
    "lr": 0.01,
    "weight_decay": 0.0,
    "norm_constraint": None,
    "batch_size": 32,
    "loss_tolerance": 0.01,
}
REQUESTS = "824d0e71487019bd6c522a481b829322756b175bfd1d5baec6db33ce2293e5e2"  # of the six tiny records
LAYER = {
    "weight_norm": 7.75,
    "rank": 7,
    "principal_share_before": 0.16,
    "principal_share_after": 0.05,
    "delta_norm": 0.99,
    "energy": 706.99,
    "energy_change": -0.0003,
    "condition": 8.7,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with a whole run of today, "whole", whose weights the old one gets."""
    tiny = TinyRun(tmp_path_factory.mktemp("old"), tiny_tokenizer, n_records=6)
    execute(settings(tiny, "whole"))
    return tiny


def settings(world: TinyRun, output: str) -> RunConfig:
    return world.config(output, alg_name="FT", alpha=0.5)


def old_fingerprint(weights: dict[str, torch.Tensor], order: list[str]) -> str:
    """Of a model, as that commit took it."""
    lines = []
    for name in order:
        digest = hashlib.sha256(f"{tuple(weights[name].shape)}{weights[name].dtype}".encode())
        digest.update(weights[name].numpy().tobytes())
        lines.append(f"{name} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def old_config(world: TinyRun, output: str) -> dict[str, Any]:
    """The content of `run.json`."""
    model, _ = load_model(world.model, "cpu")
    order = [name for name, _ in model.named_parameters()]
    return {
        "alg_name": "FT",
        **world.places,
        "hparams_fname": None,
        "ds_name": "starter",
        "dataset_size_limit": 40,
        "num_edits": 2,
        "beta_hse": 0.5,
        "alpha": 0.5,
        "seed": 0,
        "device": "cpu",
        "dtype": "auto",
        "device_map": None,
        "output_dir": str(world.folder / output),
        "checkpoints": "all",
        "log_energy_every": 1,
        "tensorboard": False,
        "batch_tokens": None,
        "z_products": "model",
        "conserve_memory": False,
        "use_cache": False,
        "continue_from_run": False,
        "overwrite": False,
        "command": "python -m experiments.evaluate --alg_name=FT --num_edits=2",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "hparams": HPARAMS,
        "case_ids": [0, 1, 2, 3, 4, 5],
        "requests": REQUESTS,
        "model": old_fingerprint(model.state_dict(), order),
        "model_dtype": "torch.float32",
        "templates": [["{}"], ["Yes. {}", "So. {}"]],
        "transposed": [],
    }


@pytest.fixture
def old(world: TinyRun, tmp_path: Path) -> tuple[TinyRun, RunConfig, Path]:
    """A run that was stopped after two of its three batches, as that commit left it on the disk."""
    tiny = world.copy(tmp_path)
    config = settings(tiny, "old")
    folder, whole = folder_of(config), folder_of(settings(world, "whole"))
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(old_config(tiny, "old"), indent=2))
    for n in (0, 2, 4):
        shutil.copy(whole / f"edit_{n}.safetensors", folder)
    names = load_file(whole / "edit_0.safetensors").keys()
    lines = [
        {"batch": index, "n_edits": 2 * index + 2, "seconds": 0.01, "layers": dict.fromkeys(names, LAYER)}
        | {"findings": ["Case 1 repeats case 0."] if index else [], "measure_seconds": 0.001}
        for index in range(2)
    ]
    (folder / "batches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {f"weight/{name}": w for name, w in load_file(whole / "edit_4.safetensors").items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    resume = json.dumps({"state": {"n_edits": 4}, "parts": {}})
    save_file(tensors, folder / "resume.safetensors", metadata={"resume": resume})
    return tiny, config, folder


def test_it_is_listed_and_read(old: tuple[TinyRun, RunConfig, Path]) -> None:
    _, _, folder = old
    assert [checkpoint.n_edits for checkpoint in list_checkpoints(folder)] == [0, 2, 4]
    assert read_config(folder)["case_ids"] == [0, 1, 2, 3, 4, 5]
    run = load_run(folder)
    assert [batch["n_edits"] for batch in run.batches] == [2, 4]
    assert run.described


def test_it_is_reported_and_scored(old: tuple[TinyRun, RunConfig, Path]) -> None:
    tiny, config, folder = old
    page = make_report([folder], progress=False)
    assert "Energy change" in page.read_text()
    model, tokenizer = load_model(tiny.model, "cpu")
    records = execute(replace(config, output_dir=str(tiny.folder / "again"))).records
    summary = evaluate_run(model, tokenizer, folder, records, progress=False)
    assert [row["n_edits"] for row in summary["checkpoints"]] == [0, 2, 4]
    assert "Editing score" in make_report([folder], progress=False).read_text()


def test_it_continues_to_where_an_unbroken_run_ends(
    old: tuple[TinyRun, RunConfig, Path], world: TinyRun
) -> None:
    _, config, folder = old
    run = execute(replace(config, continue_from_run=True))
    assert [report.n_edits for report in run.reports] == [6]
    assert contents(folder) == contents(folder_of(settings(world, "whole")))
    lines = [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [0, 1, 2]


def test_it_is_not_continued_as_another(old: tuple[TinyRun, RunConfig, Path]) -> None:
    _, config, folder = old
    with pytest.raises(SphereError, match=r"begun with other settings \(z_matmul_dtype\)"):
        execute(replace(config, continue_from_run=True, z_matmul_dtype="bfloat16"))
    with pytest.raises(SphereError, match="already holds a run"):
        execute(config)
    assert [checkpoint.n_edits for checkpoint in list_checkpoints(folder)] == [0, 2, 4]


def test_it_is_replaced_as_a_whole(old: tuple[TinyRun, RunConfig, Path]) -> None:
    """It says nothing of its files, and vouches for those that such runs have."""
    _, config, folder = old
    for name in ("summary/summary.json", "summary/cases_edit_4.jsonl", "report/report.html"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    (folder / "notes.txt").write_text("mine")
    execute(replace(config, overwrite=True, dataset_size_limit=2))
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "batches.jsonl",
        "edit_0.safetensors",
        "edit_2.safetensors",
        "ledger",
        "notes.txt",
        "resume.safetensors",
        "run.json",
    }
