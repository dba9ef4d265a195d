"""Exports: what other programs load is the edited model, or nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPT2_MODULES, tiny_gpt2
from tiny_run import TinyRun, command, records
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

import sphere.files
from sphere.checkpoints import read_config, read_weights, write_config
from sphere.commands import export as export_command
from sphere.errors import SphereError
from sphere.export import ExportOptions, export_run
from sphere.models import load_model
from sphere.runs.resolve import folder_of
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
    run = shutil.copytree(run, tmp_path / "run")
    later = [{"facts": "more.csv", "n_edits": 4, "when": "-", "command": "sphere edit --continue=x"}]
    write_config(run, read_config(run) | {"continued": later})
    readme = world.model / "README.md"
    readme.write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    try:
        export_run(run, "hf", tmp_path / "out", checkpoint=4)
        export_run(run, "hf", tmp_path / "all", checkpoint=8)
    finally:
        readme.unlink()
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "tiny after 8 edits, the last of them from more.csv" in (tmp_path / "all" / "README.md").read_text()
    )
    fact = records(8)[0]["requested_rewrite"]
    for said in (
        "license: apache-2.0",
        "tiny after 4 edits, as",
        "AlphaEdit",
        "model.layers.1.mlp.down_proj.weight",
        f"{fact['subject']} is in **{fact['target_new']['str']}**",
        "has not been scored",
        "from_pretrained",
        "Checked on 20 prompts",
        read_config(run)["command"],
        "sphere edit --continue=x",
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


# ---- adapters ----


def with_peft(base: Path, adapter: Path) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_an_exact_adapter_is_the_edited_model_in_peft(world: TinyRun, run: Path, tmp_path: Path) -> None:
    export = export_run(run, "peft", tmp_path / "out", checkpoint=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4  # one for each edit
    assert config["target_modules"] == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert "exact" in export.made[1]
    assert export.comparison.difference <= 1e-4
    adapted = with_peft(world.model, tmp_path / "out")
    assert_equal(adapted, edited_model(world, run, 4), world.model, 1e-4)
    merged = adapted.merge_and_unload()
    assert_equal(merged, edited_model(world, run, 4), world.model, 1e-4)


def test_an_adapter_of_smaller_rank_is_the_best_and_says_its_error(
    world: TinyRun, run: Path, tmp_path: Path
) -> None:
    export = export_run(run, "peft", tmp_path / "out", ExportOptions(rank=2))
    before, after = (read_weights(run / f"edit_{n}.safetensors") for n in (0, 8))
    adapted = with_peft(world.model, tmp_path / "out").merge_and_unload()
    for name, original in before.items():
        change = (after[name] - original).double()
        singular = torch.linalg.svdvals(change)
        best = float(singular[2:].norm())
        left = adapted.get_parameter(name).double() - after[name].double()
        assert float(left.norm()) == pytest.approx(best, rel=1e-3)
        assert f"{100 * best / float(change.norm()):.2g} % ({name})" in export.made[1]
    assert export.comparison.efficacy_edited is not None
    assert export.comparison.efficacy_exported is not None


def test_an_adapter_of_a_convolution_is_turned(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """GPT-2 keeps its weights as (in x out)."""
    tiny = TinyRun(tmp_path / "world", tiny_tokenizer, n_records=2)
    shutil.rmtree(tiny.model)
    tiny_gpt2().save_pretrained(tiny.model)
    tiny_tokenizer.save_pretrained(tiny.model)
    tiny.write_hparams("MEMIT", **GPT2_MODULES)
    execute(tiny.config(alg_name="MEMIT"))
    folder = folder_of(tiny.config(alg_name="MEMIT"))
    export_run(folder, "peft", tmp_path / "out")
    assert_equal(with_peft(tiny.model, tmp_path / "out"), edited_model(tiny, folder, 2), tiny.model, 1e-4)


def test_changes_that_are_not_of_low_rank_are_said_to_be_so(world: TinyRun, tmp_path: Path) -> None:
    config = world.config("rect", alg_name="MEMIT_rect", dataset_size_limit=2)
    execute(config)
    with pytest.raises(
        SphereError, match=r"not of low rank.*adapter of rank 64 is off by .*give a rank"
    ) as caught:
        export_run(folder_of(config), "peft", tmp_path / "out")
    assert caught.value.arguments == ("rank",)
    export = export_run(folder_of(config), "peft", tmp_path / "out", ExportOptions(rank=4))
    assert "not of low rank in 2 of 2 weights" in export.made[2]


def test_an_adapter_of_a_bfloat16_run_holds_the_change_and_not_the_rounding(
    world: TinyRun, tmp_path: Path
) -> None:
    """What a bfloat16 file has lost to rounding has full rank; the edits' change has not."""
    config = world.config("half", dtype="bfloat16", dataset_size_limit=4)
    execute(config)
    folder = folder_of(config)
    export_run(folder, "peft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    adapted = with_peft(world.model, tmp_path / "out").merge_and_unload()
    for name, weight in read_weights(folder / "edit_4.safetensors").items():
        off = (adapted.get_parameter(name) - weight.float()).norm() / weight.float().norm()
        assert off < 4e-3  # half of bfloat16's eps


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
        ("hf", {"shard_size": "5X"}, None, "'5X' is no size of a file"),
        ("hf", {"shard_size": "infGB"}, None, "'infGB' is no size of a file"),
        ("peft", {}, 0, "An adapter of no edits changes nothing"),
        ("peft", {"rank": 0}, None, "at least 1, got 0"),
        ("onnx", {}, None, "Unknown form 'onnx'"),
        ("hf", {}, 3, "no checkpoint after 3 edits: choose one of 0, 2, 4, 6, 8"),
    ],
)
def test_bad_requests_are_one_sentence(
    form: str, options: dict[str, Any], checkpoint: int | None, said: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(SphereError, match=said):
        export_run(run, form, tmp_path / "out", ExportOptions(**options), checkpoint=checkpoint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "form, flags, useless",
    [
        ("hf", ["--rank=8", "--quant=f16", "--adapter"], "rank, quant, adapter"),
        ("peft", ["--quant=f16", "--shard_size=5GB"], "shard_size, quant"),
        ("gguf", ["--dtype=float16", "--quant=f16"], "dtype"),
    ],
)
def test_flags_that_a_form_has_no_use_for_are_refused(
    form: str,
    flags: list[str],
    useless: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the run is looked at."""
    words = [str(tmp_path / "no run"), str(tmp_path / "out"), f"--to={form}", *flags]
    code, _, err = command(export_command.main, words, monkeypatch, capsys)
    assert code == 2
    assert f"An export to {form} has no use for {useless}, only for" in err
    assert err.endswith(f"(--{useless.replace(', ', ', --')}, --to).\n")


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
