"""The commands: help at once and in full, methods listed, flags that are those of a run, errors and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import METHODS, TinyRun, command, flags
from transformers import PreTrainedTokenizerBase

from experiments import evaluate
from scripts import evaluate_each_epoch
from sphere.baselines.mend import train
from sphere.checkpoints import read_weights
from sphere.errors import SphereError
from sphere.files import read_json
from sphere.runs.config import RunConfig, command_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    return TinyRun(tmp_path, tiny_tokenizer, 4)


Streams = pytest.CaptureFixture[str]


def test_every_setting_of_a_run_is_a_flag_with_the_same_default() -> None:
    arguments = vars(evaluate.parser().parse_args([]))
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    assert {name: str(arguments[name]) for name in defaults} == {k: str(v) for k, v in defaults.items()}


@pytest.mark.parametrize("module", [evaluate, evaluate_each_epoch])
def test_every_flag_is_explained(module: Any) -> None:
    parser = module.parser()
    assert parser.description
    assert all(action.help for action in parser._actions)
    help_text = parser.format_help()
    for action in parser._actions:
        shown = action.default not in (None, argparse.SUPPRESS) and action.default is not False
        assert not shown or f"(default: {action.default})" in " ".join(help_text.split())
    assert max(map(len, help_text.splitlines())) <= 120


@pytest.mark.parametrize("module", ["experiments.evaluate", "scripts.evaluate_each_epoch"])
def test_help_does_not_wait_for_pytorch(module: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try: runpy.run_module(%r, run_name='__main__')\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code % module], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: ")


def test_methods_are_listed_with_reference_and_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    code, out, _ = command(
        evaluate.main, ["--list_methods", f"--hparams_dir={ROOT / 'hparams'}"], monkeypatch, capsys
    )
    assert code == 0
    _, *paragraphs = out.strip().split("\n\n")
    assert [paragraph.splitlines()[0] for paragraph in paragraphs] == sorted(METHODS)
    for paragraph in paragraphs:
        assert "arXiv" in paragraph
        assert f"alpha {'0.5' if paragraph.startswith('AlphaEdit') else '0.8'}, beta_hse 0.5" in paragraph
        assert "SmolLM2-135M  layers " in paragraph
        assert "Qwen2.5-7B" in paragraph
    assert "rect_share 0.4" in out
    assert "prune_continue unconditioned" in out
    assert "nullspace_threshold 0.02" in out


def test_edit_and_score(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    """One command edits and prints the table; the other one scores again and prints the same."""
    argv = tiny.flags(use_cache=True, conserve_memory=True, generation_test_interval=-1)
    code, out, _ = command(evaluate.main, argv, monkeypatch, capsys)
    assert code == 0
    folder = tiny.folder / "runs/AlphaEdit/tiny/starter_weight_data_batch_2_0.5_0.5"
    assert f"Weights and log: {folder}" in out
    summary = read_json(folder / "summary" / "summary.json", "summary")
    assert [row["n_edits"] for row in summary["checkpoints"]] == [0, 2, 4]
    assert list((tiny.folder / "cache" / "z").glob("*.safetensors"))
    argv = flags({"weight_folder": folder, "ds_name": "starter", "data_dir": tiny.folder / "data"})
    code, again, _ = command(
        evaluate_each_epoch.main, [*argv, f"--model_name={tiny.model}", "--device=cpu"], monkeypatch, capsys
    )
    assert code == 0
    assert again.split("\n\nScores:")[0].strip() in out


def test_published_checkpoints_are_scored(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    """A folder of .pth files ({"weight": {name: tensor}}), no configuration beside them: the same scores."""
    code, _, _ = command(evaluate.main, tiny.flags(), monkeypatch, capsys)
    assert code == 0
    done = tiny.folder / "runs/AlphaEdit/tiny/starter_weight_data_batch_2_0.5_0.5"
    published = tiny.folder / "published"
    published.mkdir()
    for n in (2, 4):
        torch.save({"weight": read_weights(done / f"edit_{n}.safetensors")}, published / f"edit_{n}.pth")
    places = {"weight_folder": published, "model_name": tiny.model, "data_dir": tiny.folder / "data"}
    code, _, _ = command(
        evaluate_each_epoch.main,
        flags({**places, "ds_name": "starter", "device": "cpu"}),
        monkeypatch,
        capsys,
    )
    assert code == 0
    own, theirs = (read_json(f / "summary" / "summary.json", "")["checkpoints"] for f in (done, published))
    assert [row["metrics"] for row in own] == [row["metrics"] for row in theirs]
    assert [row["checkpoint"] for row in theirs] == [None, "edit_2.pth", "edit_4.pth"]


def test_the_published_commands_parse() -> None:
    edit = evaluate.parser().parse_args(
        "--alg_name=AlphaEdit --model_name=./Qwen2.5-7B-Instruct --hparams_fname=Qwen2.5-7B.json --ds_name=mcf "
        "--dataset_size_limit=5000 --num_edits=100 --beta_hse=0.5 --alpha=0.5".split()
    )
    assert (edit.dataset_size_limit, edit.num_edits, edit.alpha) == (5000, 100, 0.5)
    score = evaluate_each_epoch.parser().parse_args(
        "--model_name=./Qwen2.5-7B-Instruct --weight_folder=./Edited_Weight/AlphaEdit/Qwen2.5-7B-Instruct/"
        "mcf_weight_data_batch_100_0.5_0.5/ --ds_name=mcf --dataset_size_limit=5000 "
        "--generation_test_interval=100".split()
    )
    assert score.generation_test_interval == 100


def test_a_run_knows_the_command_that_makes_it_again(tiny: TinyRun) -> None:
    config = tiny.config(alpha=0.25, use_cache=True)
    words = command_of(dataclasses.asdict(config)).split()
    assert words[:3] == ["python", "-m", "sphere"]
    arguments = vars(evaluate.parser().parse_args(words[4:]))
    for field in dataclasses.fields(RunConfig):
        assert str(arguments[field.name]) == str(getattr(config, field.name))


# ---- errors ----


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (SphereError("It\nis\n  so."), 2, "error: It is so."),
        (
            FileNotFoundError(2, "No such file", "a.txt"),
            2,
            "error: No such file (a.txt): check that the path exists",
        ),
        (OSError(28, "No space left"), 2, "error: No space left: free some space"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to ..."),
            2,
            "error: The GPU's memory is full: use a smaller",
        ),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_errors_are_one_sentence(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    def main(_argv: list[str] | None) -> int:
        raise error

    found, out, err = command(main, [], monkeypatch, capsys)
    assert (found, out) == (code, "")
    assert err.strip().startswith(says)
    assert len(err.strip().splitlines()) == 1


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    with pytest.raises(ZeroDivisionError):
        command(lambda _: 1 // 0, [], monkeypatch, capsys)


def test_an_error_stands_on_its_own_line(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    from tqdm.auto import tqdm

    bars = []

    def main(_argv: list[str] | None) -> int:
        bars.append(tqdm(total=3, desc="work", file=sys.stderr))
        raise SphereError("It is so.")

    _, _, err = command(main, [], monkeypatch, capsys)
    assert err.splitlines()[-1] == "error: It is so."


def test_training_with_a_wrong_entry(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    code, _, err = command(train.main, ["no_such_entry=3"], monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: ")
    assert "no_such_entry" in err
