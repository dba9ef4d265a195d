"""Whatever is wrong with what a command is given: one sentence, a non-zero exit status, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import TinyRun, command, contents, flags, records
from transformers import PreTrainedTokenizerBase

import sphere.data.records
import sphere.files
import sphere.runs.run
import sphere.values.corpus
from experiments import evaluate
from scripts import evaluate_each_epoch
from sphere.checkpoints import read_weights
from sphere.data.records import load_records
from sphere.errors import SphereError
from sphere.methods.alphaedit import AlphaEdit
from sphere.methods.ft import FT
from sphere.runs.config import RunConfig
from sphere.runs.resolve import hparams_path
from sphere.runs.run import execute

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with a finished run of three batches."""
    tiny = TinyRun(tmp_path_factory.mktemp("errors"), tiny_tokenizer, 6)
    execute(tiny.config("done"))
    return tiny


@pytest.fixture
def tiny(base: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy of that world, to be spoilt."""
    return base.copy(tmp_path)


Refuse = Callable[..., str]


@pytest.fixture
def refused(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Edit, and return the one sentence that says why not; the files that were there are as they were."""

    def run(main: Any = evaluate.main, argv: list[str] | None = None, **settings: Any) -> str:
        before = snapshot(tiny.folder)
        argv = tiny.flags(skip_scoring=True, **settings) if argv is None else argv
        code, _, err = command(main, argv, monkeypatch, capsys)
        assert code == 2
        assert snapshot(tiny.folder) == before
        return sentence(err)

    return run


def sentence(err: str) -> str:
    """The last line of stderr, the only one that is an error."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert "Traceback" not in err
    return lines[-1]


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files, but for what only says that somebody is at work, and scores that are finished."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", ".lock.json") and path.parent.name != "summary"
    }


def one_record(**changes: Any) -> list[dict[str, Any]]:
    """A dataset of one record; a key of the rewrite, or of the record, changed, or removed by None."""
    record = records(1)[0]
    for key, value in changes.items():
        part = record["requested_rewrite"] if key in record["requested_rewrite"] else record
        part[key] = value
        if value is None:
            del part[key]
    return [record]


# ---- flags ----


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alg_name": "FOO"}, "Unknown method 'FOO'.*use one of AlphaEdit, BetaEdit, EMMET, ENCORE, FT"),
        (
            {"hparams_fname": "no.json"},
            r"No hyperparameter file .*no\.json.*one of: tiny\.json.*--hparams_fname, ",
        ),
        ({"hparams_dir": "nowhere"}, r"No hyperparameter file at nowhere/AlphaEdit/tiny\.json"),
        ({"model_name": "./none", "hparams_fname": "tiny.json"}, "No model at none.*--model_name"),
        ({"ds_name": "foo"}, "argument --ds_name: invalid choice: 'foo'"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'.*float32, bfloat16"),
        ({"device": "cuda:99"}, "Device 'cuda:99' is not available.*use auto or cpu .--device"),
        ({"device": "gpu"}, "Device 'gpu' is not available"),
        (
            {"device": "mps"},
            r"Device 'mps' is not available here \(it has no float64.*use auto or cpu .--device",
        ),
        ({"device": "meta"}, "Device 'meta' is not available"),
        ({"device_map": "foo"}, "device_map"),
        ({"num_edits": 0}, "argument --num_edits: .*at least 1, got '0'"),
        ({"batch_tokens": 0}, "argument --batch_tokens: .*at least 1, got '0'"),
        ({"dataset_size_limit": -3}, "argument --dataset_size_limit: .*at least 1, got '-3'"),
        ({"beta_hse": 1.5}, "beta_hse is a cumulative ratio between 0 and 1, or 'auto', got 1.5"),
        ({"beta_hse": "nan"}, "beta_hse .* got nan"),
        ({"alpha": -0.1}, "alpha is a suppression strength from 0 to 1, or 'auto', got -0.1.*--alpha"),
        ({"alpha": "much"}, "argument --alpha: expected a number or auto, got 'much'"),
        ({"seed": -1}, "seed must be a whole number from 0.*--seed"),
        ({"seed": 2**70}, "seed must be a whole number from 0.*--seed"),
        ({"checkpoints": "3"}, r"checkpoints names \[3\], but batches end at 2, 4, 6.*--checkpoints"),
        ({"checkpoints": "some"}, "checkpoints is 'ends', 'all' or numbers of edits.*got 'some'"),
        ({"no_such_flag": True}, "unrecognized arguments: --no_such_flag"),
        ({"continue_from_run": True}, "no run to continue.*begin it without continuing"),
        (
            {"continue_from_run": True, "overwrite": True},
            "ask for one of them .--continue_from_run, --overwrite",
        ),
        ({"output": "data/starter.json"}, r"starter\.json \(it is a file\).*--output_dir"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_flags(settings: dict[str, Any], says: str, refused: Refuse) -> None:
    assert re.search(says, refused(**settings))


@pytest.mark.parametrize(
    "device", ["mps", "mps:0", "xpu", "hpu", "vulkan", "meta", "xla", "privateuseone", "x" * 9]
)
def test_a_device_that_cannot_be_used_is_one_short_sentence(device: str, refused: Refuse) -> None:
    """PyTorch's own message lists every backend that it was ever built for."""
    said = refused(device=device)
    assert said.startswith(f"error: Device '{device}' is not available here (")
    assert len(said) < 200


@pytest.mark.parametrize("device_map", ["mps", "xpu", "cuda:99", "x" * 9])
def test_a_device_map_that_cannot_be_used_is_one_short_sentence(device_map: str, refused: Refuse) -> None:
    said = refused(device_map=device_map)
    assert said.startswith(f"error: Device '{device_map}' is not available here (")
    assert said.endswith(
        "let device_map be one of auto, balanced, balanced_low_0, sequential, or name devices that "
        "are here (--device_map)."
    )
    assert len(said) < 300


def test_shipped_files_are_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    """One's own go first; else the sentence says where a file was looked for and which flag helps."""
    monkeypatch.chdir(tmp_path)
    path = hparams_path(RunConfig())
    assert path.is_file()
    assert load_records("starter", limit=2)
    own = tmp_path / "hparams" / "AlphaEdit" / path.name
    own.write_bytes(path.read_bytes())
    assert hparams_path(RunConfig()).resolve() == own
    said = refused(hparams_dir="hparams", hparams_fname="no.json")
    assert f"looked in {own.parent} and {path.parent}" in said
    assert "--hparams_dir" in said


def test_run_that_is_there(refused: Refuse) -> None:
    said = refused(output="done")
    assert re.search("already holds a run: continue it, overwrite it", said)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 3}, "seed"),
        ({"dtype": "bfloat16"}, "model, model_dtype"),
        ({"dataset_size_limit": 4}, "case_ids, requests"),
    ],
)
def test_continue_with_other_settings(settings: dict[str, Any], named: str, refused: Refuse) -> None:
    said = refused(output="done", continue_from_run=True, **settings)
    assert f"begun with other settings ({named}): continue it with the same ones" in said


def test_continue_with_other_hparams_or_facts(tiny: TinyRun, refused: Refuse) -> None:
    tiny.write_hparams("AlphaEdit", v_lr=0.1)
    assert "other settings (hparams)" in refused(output="done", continue_from_run=True)
    tiny.write_hparams("AlphaEdit")
    tiny.write_records(records(6, seed=5))
    assert "other settings (requests)" in refused(output="done", continue_from_run=True)


# ---- datasets ----


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1,", r"The dataset .*starter\.json is not valid JSON \(line 1, column 4"),
        ({}, "is not a list of records"),
        ([], "is not a list of records"),
        ([3], "Record 0 of .* not an object"),
        ([{"case_id": 1}], "Record 0 of .*the key 'requested_rewrite' is missing"),
        (one_record(subject=None), "Record 0 of .*the key 'subject' is missing"),
        (one_record(case_id="a"), "'case_id' should be a whole number, got 'a'"),
        (one_record(paraphrase_prompts="a"), "'paraphrase_prompts' should be a list, got 'a'"),
        (one_record(target_new={"str": 5}), "'target_new.str' should be a text, got 5"),
        (one_record(prompt="It is in"), r"'prompt' has no '\{\}' for the subject: 'It is in'"),
        (one_record(prompt="{} and {}"), "name its subject's place once"),
        (one_record(subject=" "), "'subject' is blank"),
        (one_record(target_new={"str": ""}), "'target_new.str' is blank"),
        (one_record() + one_record(), "share the case_id 0"),
    ],
)
def test_datasets(content: Any, says: str, tiny: TinyRun, refused: Refuse) -> None:
    tiny.write_records(content)
    assert re.search(says, refused())


def test_subject_that_is_not_in_its_question(tiny: TinyRun, refused: Refuse) -> None:
    entry = {"subject": "Ann", "src": "Where is Bo?", "answers": ["Rome"]}
    (tiny.folder / "data" / "zsre_mend_eval.json").write_text(json.dumps([entry]))
    assert "its subject 'Ann' is not in 'src': 'Where is Bo?'" in refused(ds_name="zsre")


def test_dataset_without_network(tiny: TinyRun, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sphere.data.records, "PUBLISHED_HOME", "http://127.0.0.1:9")
    said = refused(ds_name="mcf")
    assert f"put the published file at {tiny.folder / 'data' / 'multi_counterfact.json'}" in said
    assert "--data_dir" in said


# ---- hyperparameters ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"L2": None}, "AlphaEditHParams: missing L2"),
        ({"foo": 1}, "AlphaEditHParams: unknown foo"),
        (
            {"v_lr": "x", "layers": "1"},
            "layers must be a list of whole numbers, got '1'; .*v_lr must be a number",
        ),
        ({"layers": []}, "layers must be increasing layer numbers"),
        (
            {"layers": [1, 9], "v_loss_layer": 9},
            "layers names layer 9, but LlamaForCausalLM has layers 0 to 3.*correct layers",
        ),
        ({"v_loss_layer": 9}, "v_loss_layer names layer 9, but .*layers 0 to 3"),
        ({"v_loss_layer": 1}, "v_loss_layer 1 lies below the last edited layer 2"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps must be at least 1"),
        ({"v_lr": -1}, "v_lr must be positive, got -1"),
        ({"kl_factor": -1}, "kl_factor must not be negative"),
        ({"mom2_n_samples": 0}, "mom2_n_samples must be positive"),
        ({"mom2_dtype": "int8"}, "mom2_dtype must be one of float32.*got 'int8'"),
        ({"mom2_dataset": "none.txt"}, "mom2_dataset 'none.txt' is neither one of wikipedia"),
        ({"nullspace_threshold": 0}, "below nullspace_threshold 0 .*raise nullspace_threshold"),
        ({"L2": 0}, "L2 must be positive"),
        ({"fact_token": "last"}, "fact_token must be 'subject_last', got 'last'"),
        ({"rewrite_module_tmp": "a.{}.b"}, r"no module 'a\.1\.b': correct rewrite_module_tmp"),
        ({"rewrite_module_tmp": "a"}, r"rewrite_module_tmp must hold '\{\}'"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp"}, r"no weight 'model\.layers\.1\.mlp\.weight'"),
        ({"rewrite_module_tmp": "model.layers.{}.input_layernorm"}, "is not a weight matrix"),
        ({"layer_module_tmp": "a.{}"}, r"no module 'a\.0': correct layer_module_tmp"),
        ({"ln_f_module": "a"}, "no module 'a': correct ln_f_module"),
        ({"lm_head_module": "model.norm"}, r"'model\.norm' is not the head.*lm_head_module"),
    ],
)
def test_hparams(changes: dict[str, Any], says: str, tiny: TinyRun, refused: Refuse) -> None:
    tiny.write_hparams("AlphaEdit", **changes)
    assert re.search(says, refused())


@pytest.mark.parametrize(
    ("content", "says"), [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_hparams_file(content: str, says: str, tiny: TinyRun, refused: Refuse) -> None:
    tiny.write_hparams("AlphaEdit").write_text(content)
    said = refused()
    assert says in said
    assert "hparams/AlphaEdit/tiny.json" in said


# ---- models ----


def spoil(tiny: TinyRun, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the model's weights on disk."""
    path = tiny.model / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w[NAME].fill_(float("nan")), rf"The weight '{NAME}' of .* not finite"),
        (lambda w: w["lm_head.weight"][0].fill_(float("inf")), r"'lm_head\.weight' of .* not finite"),
        (lambda w: w.pop(NAME), f"1 are missing or of another shape, the first is '{NAME}'"),
        (
            lambda w: w.update({NAME: torch.zeros(3, 3)}),
            f"missing or of another shape, the first is '{NAME}'",
        ),
    ],
    ids=["nan", "infinity", "missing", "shape"],
)
def test_weights(change: Any, says: str, tiny: TinyRun, refused: Refuse) -> None:
    spoil(tiny, change)
    assert re.search(says, refused())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", None, "no file named model.safetensors"),
        ("model.safetensors", b"xx", "Cannot load a causal language model from .*tiny"),
        ("config.json", None, r"holds no model \(no config\.json\)"),
        ("config.json", b"{", "not a valid JSON"),
        ("config.json", b"{}", "Unrecognized model"),
        ("tokenizer.json", b"{", "Cannot load the tokenizer of .*tiny"),
    ],
)
def test_model_files(name: str, content: bytes | None, says: str, tiny: TinyRun, refused: Refuse) -> None:
    if content is None:
        (tiny.model / name).unlink()
    else:
        (tiny.model / name).write_bytes(content)
    assert re.search(says, refused())


def test_model_without_network(refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(model_name="nobody/nothing", hparams_fname="tiny.json")
    assert "Cannot load a causal language model from 'nobody/nothing'" in said
    assert "--model_name" in said


# ---- statistics ----


def test_corpus_without_network(tiny: TinyRun, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tiny.write_hparams("AlphaEdit", mom2_dataset="wikipedia")
    said = refused()
    assert "Cannot stream 'wikipedia'" in said
    assert "nobody answers" in said
    assert "set mom2_dataset to a local" in said


def test_damaged_second_moment_is_computed_again(tiny: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    paths = sorted((tiny.folder / "stats").rglob("*down_proj.safetensors"))
    good = [path.read_bytes() for path in paths]
    paths[0].write_bytes(good[0][:-9])
    folder = execute(tiny.config("again")).folder
    assert f"The second moment in {paths[0]} is damaged" in caplog.text
    assert contents(folder) == contents(tiny.folder / "done" / folder.relative_to(tiny.folder / "again"))
    assert [load_file(path)["second_moment"].shape for path in paths] == [(48, 48)] * 2


def test_mend_without_a_trained_editor(tiny: TinyRun, refused: Refuse) -> None:
    path = tiny.folder / "stats" / "tiny" / "mend.safetensors"
    path.write_bytes(b"a" * 100)
    assert f"{path} is not a trained MEND editor" in refused(alg_name="MEND")
    path.unlink()
    assert f"no trained editor at {path}: train one with" in refused(alg_name="MEND")


# ---- batches that break ----


def test_broken_batch_keeps_the_last_good_state(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch and the layer are named, the state before it can be scored, and once fixed the run goes on."""
    original = AlphaEdit.updates

    def updates(self: AlphaEdit, requests: Any) -> Any:
        for name, delta in original(self, requests):
            broken = requests[0].case_id == 4 and "layers.2" in name
            yield name, delta * float("nan") if broken else delta

    with monkeypatch.context() as patch:
        patch.setattr(AlphaEdit, "updates", updates)
        code, _, err = command(
            evaluate.main, tiny.flags("broken", skip_scoring=True, checkpoints="ends"), monkeypatch, capsys
        )
    folder = next((tiny.folder / "broken" / "AlphaEdit" / "tiny").iterdir())
    done = next((tiny.folder / "done" / "AlphaEdit" / "tiny").iterdir())
    assert code == 2
    assert (
        "Batch 3 of 3: The update of model.layers.2.mlp.down_proj.weight in the batch of cases 4 to 5 is not finite"
        in sentence(err)
    )
    assert f"the last good state, after 4 edits, is kept in {folder / 'edit_4.safetensors'}" in sentence(err)
    assert contents(folder, "edit_4*") == contents(done, "edit_4*")
    execute(tiny.config("broken", continue_from_run=True))
    assert contents(folder) == contents(done)


def test_a_run_may_go_on_while_the_model_breaks(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged and measured like any other batch; by default it stops the run."""
    original = FT.updates

    def updates(self: FT, requests: Any) -> Any:
        for name, delta in original(self, requests):
            yield name, delta * 1e4 if requests[0].case_id == 2 else delta

    monkeypatch.setattr(FT, "updates", updates)
    settings = {"alg_name": "FT", "log_energy_every": 1}
    with pytest.raises(SphereError, match=r"Batch 2 of 3: .*the model is breaking"):
        execute(tiny.config("breaks", **settings))
    run = execute(tiny.config("breaks", **settings, on_breakdown="continue", continue_from_run=True))
    assert [report.n_edits for report in run.reports] == [4, 6]
    assert "the model is breaking" in caplog.text
    lines = [json.loads(line) for line in (run.folder / "batches.jsonl").read_text().splitlines()]
    assert [bool(line["warnings"]) for line in lines] == [False, True, False]
    assert "condition" in lines[1]["layers"][NAME]


# ---- disks ----


def test_full_disk(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However much fits: one sentence, nothing half-written; and with room again the run goes on exactly."""
    done = next((tiny.folder / "done" / "AlphaEdit" / "tiny").iterdir())
    synced = os.fsync
    for room in (1, 5, 8, 11, 15):
        calls = 0

        def fsync(handle: int) -> None:
            nonlocal calls
            calls += 1
            if calls > room:  # noqa: B023 (used within the round)
                raise OSError(28, "No space left on device")
            synced(handle)

        output = f"full-{room}"
        argv = tiny.flags(output, skip_scoring=True, checkpoints="all")
        with monkeypatch.context() as patch:
            patch.setattr(sphere.files.os, "fsync", fsync)
            code, _, err = command(evaluate.main, argv, monkeypatch, capsys)
        assert code == 2
        assert "No space left on device" in sentence(err)
        assert "free some space" in sentence(err)
        folder = tiny.folder / output / done.relative_to(tiny.folder / "done")
        assert {path.name for path in folder.glob(".*")} <= {".lock"}
        execute(tiny.config(output, continue_from_run=(folder / "run.json").exists()))
        assert contents(folder) == contents(done)


def test_cache_that_cannot_be_written_is_no_error(tiny: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    (tiny.folder / "cache").write_text("a file")
    execute(tiny.config("cached", use_cache=True))
    assert "Target values were not cached: Cannot write" in caplog.text


# ---- runs and checkpoints that are damaged ----


def test_damaged_run(tiny: TinyRun, refused: Refuse) -> None:
    folder = next((tiny.folder / "done" / "AlphaEdit" / "tiny").iterdir())
    good = (folder / "run.json").read_text()
    (folder / "run.json").write_text("{")
    assert "run.json is not valid JSON" in refused(output="done", continue_from_run=True)
    (folder / "run.json").write_text(good)
    (folder / "resume.safetensors").write_bytes(b"a" * 20)
    said = refused(output="done", continue_from_run=True)
    assert f"The resume point {folder / 'resume.safetensors'} is damaged" in said
    assert "overwrite the run" in said


class Dangerous:
    """Unpickled, it would make a folder."""

    folder = Path(tempfile.gettempdir()) / "executed-by-a-checkpoint"

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def scored(tiny: TinyRun, folder: Path, **settings: Any) -> list[str]:
    """Flags of `scripts.evaluate_each_epoch`."""
    places = {
        "weight_folder": folder,
        "model_name": tiny.model,
        "data_dir": tiny.folder / "data",
        "device": "cpu",
    }
    return flags({**places, "ds_name": "starter", **settings})


def published(tiny: TinyRun) -> Path:
    """A folder as the published code leaves it: .pth files, no configuration."""
    done = next((tiny.folder / "done" / "AlphaEdit" / "tiny").iterdir())
    folder = tiny.folder / "published"
    folder.mkdir()
    for n in (2, 6):
        torch.save({"weight": read_weights(done / f"edit_{n}.safetensors")}, folder / f"edit_{n}.pth")
    return folder


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": Dangerous()}, "could run code"),
        ([1], r'does not hold \{"weight": \{name: tensor\}\}'),
        ({"weight": {"a": 1}}, r'does not hold \{"weight": \{name: tensor\}\}'),
        (
            {"weight": {"foo.weight": torch.zeros(2, 2)}},
            "of another model than LlamaForCausalLM.*give the model that the run started from",
        ),
        ({"weight": {NAME: torch.zeros(2, 2)}}, "of another model.*has shape .2, 2. there"),
        (
            {"weight": {NAME: torch.full((32, 48), float("nan"))}},
            f"'{NAME}' in the checkpoint .* is not finite",
        ),
        (b"abc", "Cannot read the checkpoint .* safely"),
        (b"", "Cannot read the checkpoint .* safely .EOFError"),
    ],
    ids=["code", "list", "numbers", "name", "shape", "nan", "bytes", "empty"],
)
def test_published_checkpoints(content: Any, says: str, tiny: TinyRun, refused: Refuse) -> None:
    path = published(tiny) / "edit_2.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, pickle_module=pickle)
    said = refused(evaluate_each_epoch.main, scored(tiny, path.parent))
    assert re.search(says, said)
    assert str(path) in said
    assert not Dangerous.folder.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight_folder": "nowhere"}, "No folder nowhere: .*--weight_folder"),
        ({"dataset_size_limit": 2}, "made 6 edits, of which the dataset holds only 2"),
        ({"seed": "x"}, "argument --seed: invalid int value"),
        ({"weight_folder": None}, "required: --weight_folder"),
    ],
)
def test_scoring(settings: dict[str, Any], says: str, tiny: TinyRun, refused: Refuse) -> None:
    folder = next((tiny.folder / "done" / "AlphaEdit" / "tiny").iterdir())
    assert re.search(says, refused(evaluate_each_epoch.main, scored(tiny, folder, **settings)))


def test_scoring_a_folder_without_checkpoints(tiny: TinyRun, refused: Refuse) -> None:
    said = refused(evaluate_each_epoch.main, scored(tiny, tiny.folder / "data"))
    assert "No checkpoints (edit_<n>.safetensors or .pth)" in said


def test_scoring_a_cut_checkpoint(tiny: TinyRun, refused: Refuse) -> None:
    folder = next((tiny.folder / "done" / "AlphaEdit" / "tiny").iterdir())
    path = folder / "edit_2.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    said = refused(evaluate_each_epoch.main, scored(tiny, folder))
    assert said.count(str(path)) == 1
    assert "write it again or remove it" in said


# ---- real processes ----


@pytest.mark.parametrize(
    ("module", "argv", "says"),
    [
        (
            "experiments.evaluate",
            ["--model_name=./none", "--hparams_fname=SmolLM2-135M.json"],
            "No model at none",
        ),
        ("scripts.evaluate_each_epoch", ["--weight_folder=none", "--ds_name=starter"], "No folder none"),
    ],
)
def test_commands(module: str, argv: list[str], says: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", module, *argv], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert sentence(run.stderr).startswith(f"error: {says}")
