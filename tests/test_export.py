"""Exports: what other programs load is the edited model, or nothing is left."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2
from tiny_run import TinyRun, command, records
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

import sphere.files
from sphere.checkpoints import read_weights
from sphere.commands import export as export_command
from sphere.errors import SphereError
from sphere.export import ExportOptions, export_run
from sphere.models import load_model
from sphere.runs.config import folder_of
from sphere.runs.run import execute

PROMPTS = ("Abcde is in", "Where is Rome? In", "x")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with a finished run in "runs"; its model samples at a temperature, as published ones do."""
    tiny = TinyRun(tmp_path_factory.mktemp("export"), tiny_tokenizer)
    GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=0).save_pretrained(tiny.model)
    path = tiny.model / "generation_config.json"
    path.write_text(path.read_text().replace('"do_sample": true', '"do_sample": false'))
    execute(tiny.config())
    return tiny


@pytest.fixture
def run(world: TinyRun) -> Path:
    """The run's folder."""
    return folder_of(world.config())


def edited_model(world: TinyRun, folder: Path, n_edits: int) -> torch.nn.Module:
    """The plain way: the unedited model with a checkpoint loaded over it."""
    model, _ = load_model(str(world.model), device="cpu")
    model.load_state_dict(read_weights(folder / f"edit_{n_edits}.safetensors"), strict=False)
    return model


def logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    return model(**tokenizer(prompt, return_tensors="pt")).logits


def assert_equal(one: torch.nn.Module, other: torch.nn.Module, folder: Path, within: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        torch.testing.assert_close(
            logits(one, tokenizer, prompt), logits(other, tokenizer, prompt), atol=within, rtol=0
        )


@pytest.mark.parametrize("n_edits", [None, 4])
def test_hf_loads_in_plain_transformers_as_the_edited_model(
    n_edits: int | None, world: TinyRun, run: Path, tmp_path: Path
) -> None:
    export = export_run(run, "hf", tmp_path / "out", checkpoint=n_edits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert export.n_edits == (n_edits or 8)
    assert export.comparison.difference <= 1e-5
    assert export.comparison.n_prompts == 20
    assert export.comparison.n_facts == export.n_edits
    assert_equal(loaded, edited_model(world, run, export.n_edits), tmp_path / "out", 1e-5)
    assert loaded.generation_config.temperature == 0.5
    assert not list(tmp_path.glob(".*"))


def test_hf_of_no_edits_is_the_unedited_model(world: TinyRun, run: Path, tmp_path: Path) -> None:
    export_run(run, "hf", tmp_path / "out", checkpoint=0)
    base = AutoModelForCausalLM.from_pretrained(world.model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), loaded.parameters(), strict=True))
    assert "unedited" in (tmp_path / "out" / "README.md").read_text()


def test_hf_in_shards_and_another_dtype(world: TinyRun, run: Path, tmp_path: Path) -> None:
    options = ExportOptions(dtype="bfloat16", shard_size="20KB")
    export = export_run(run, "hf", tmp_path / "out", options)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert max(path.stat().st_size for path in shards) < 30_000
    assert "bfloat16" in export.made[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    plain = edited_model(world, run, 8).to(torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert 0 < export.comparison.difference < 1


def test_hf_keeps_tied_weights_tied(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tiny = TinyRun(tmp_path / "world", tiny_tokenizer, n_records=2)
    tied = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**LlamaConfig.from_pretrained(tiny.model).to_dict(), "tie_word_embeddings": True})
    )
    tied.save_pretrained(tiny.model)
    execute(tiny.config())
    folder = folder_of(tiny.config())
    export_run(folder, "hf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_equal(loaded, edited_model(tiny, folder, 2), tmp_path / "out", 1e-5)


def test_the_card_says_what_was_edited_how_and_from_what(world: TinyRun, run: Path, tmp_path: Path) -> None:
    readme = world.model / "README.md"
    readme.write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    try:
        export_run(run, "hf", tmp_path / "out", checkpoint=4)
    finally:
        readme.unlink()
    text = (tmp_path / "out" / "README.md").read_text()
    fact = records(8)[0]["requested_rewrite"]
    for said in (
        "license: apache-2.0",
        "after 4 edits",
        "AlphaEdit",
        "model.layers.1.mlp.down_proj.weight",
        f"{fact['subject']} is in **{fact['target_new']['str']}**",
        "has not been scored",
        "from_pretrained",
        "Checked on 20 prompts",
    ):
        assert said in text, said
    assert str(world.folder / "tiny") not in text.split("## How")[0]  # no places of one machine


def test_the_command_prints_the_largest_difference(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(run), "--to", "hf", str(tmp_path / "out"), "--checkpoint", "2", "--device", "cpu"]
    code, out, _ = command(export_command.main, argv, monkeypatch, capsys)
    assert code == 0
    assert "largest difference of a logit from the edited model's 0 " in out
    assert "Efficacy of 2 edited facts" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---- what goes wrong leaves nothing ----


def test_nothing_is_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SphereError, match=r"something at .*out already"):
        export_run(run, "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_leaves_nothing(
    room: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, synced = 0, os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > room:
            raise OSError(28, "No space left on device")
        synced(handle)

    monkeypatch.setattr(sphere.files.os, "fsync", fsync)
    with pytest.raises(SphereError, match="No space left on device; free some space"):
        export_run(run, "hf", tmp_path / "place" / "out")
    assert not list((tmp_path / "place").iterdir())


def test_too_little_space_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(SphereError, match=r"GB are to be written to .*, where 0.00 GB are free"):
        export_run(run, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_model_that_is_not_at_hand(world: TinyRun, run: Path, tmp_path: Path) -> None:
    elsewhere = world.model.rename(world.folder / "moved")
    try:
        with pytest.raises(SphereError, match=r"started from is not at hand.*name the place") as caught:
            export_run(run, "hf", tmp_path / "out")
        assert caught.value.arguments == ("model_name",)
        assert not list(tmp_path.iterdir())
        export_run(run, "hf", tmp_path / "out", model_name=str(elsewhere))
    finally:
        elsewhere.rename(world.model)


def test_another_base_model_is_refused(
    run: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SphereError, match="is of another model"):
        export_run(run, "hf", tmp_path / "out", model_name=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "form, options, checkpoint, said",
    [
        ("hf", {"dtype": "int3"}, None, "Unknown dtype 'int3'"),
        ("onnx", {}, None, "Unknown form 'onnx'"),
        ("hf", {}, 3, "no checkpoint after 3 edits: choose one of 0, 2, 4, 6, 8"),
    ],
)
def test_bad_requests_are_one_sentence(
    form: str, options: dict[str, str], checkpoint: int | None, said: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(SphereError, match=said):
        export_run(run, form, tmp_path / "out", ExportOptions(**options), checkpoint=checkpoint)
    assert not list(tmp_path.iterdir())


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(SphereError, match="No folder"):
        export_run(tmp_path / "no run", "hf", tmp_path / "out")


def test_an_export_that_reads_back_otherwise_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a disk had flipped bits: the last shard's weights are others than those that were written."""
    from sphere.export import run as export_module
    from sphere.export.hf import HuggingFaceFolder

    class Damaged(HuggingFaceFolder):
        def write(self, run, folder):  # type: ignore[no-untyped-def]
            made = super().write(run, folder)
            run.model.model.norm.weight.data *= 1.01
            return made

    monkeypatch.setattr(export_module, "HuggingFaceFolder", Damaged)
    with pytest.raises(SphereError, match=r"more than rounding.*not kept"):
        export_run(run, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())
