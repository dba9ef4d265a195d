"""The commands: help at once and in full, methods listed, flags that are those of a run, errors and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import METHODS, TinyRun, command, flags
from transformers import PreTrainedTokenizerBase

import sphere.commands.main
from experiments import evaluate, tune
from scripts import evaluate_each_epoch
from sphere.baselines.mend import train
from sphere.checkpoints import read_weights
from sphere.commands.common import config_of, with_flags
from sphere.commands.main import COMMANDS
from sphere.errors import SphereError
from sphere.files import read_json
from sphere.runs.config import RunConfig, by_new_names, command_of, settings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    return TinyRun(tmp_path, tiny_tokenizer, 4)


Streams = pytest.CaptureFixture[str]


def test_every_setting_of_a_run_is_a_flag_with_the_same_default() -> None:
    arguments = evaluate.parser().parse_args([])
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    assert vars(config_of(arguments)) == defaults
    assert defaults.keys() <= vars(arguments).keys()


def test_facts_are_edited_whole_unless_a_limit_is_given() -> None:
    """By flags, in a sweep, and in the command that run.json says."""
    from sphere.commands.sweep_job import jobs_of

    def swept(*words: str) -> RunConfig:
        return jobs_of(list(words))[0].config

    for config in config_of(evaluate.parser().parse_args(["--facts=f.csv"])), swept("facts=f.csv"):
        assert (config.ds_name, config.dataset_size_limit) == ("facts", None)
    words = ["--dataset_size_limit=40", "--facts=f.csv"]
    config = config_of(evaluate.parser().parse_args(words))
    assert config.dataset_size_limit == 40
    assert swept("facts=f.csv", "dataset_size_limit=40").dataset_size_limit == 40
    assert sorted(shlex.split(command_of(dataclasses.asdict(config)))[4:]) == words
    assert swept().dataset_size_limit == settings()["dataset_size_limit"].default
    assert swept("dataset_size_limit=null").dataset_size_limit is None


def test_flags_sweep_keys_and_commands_are_made_of_the_same_fields(tmp_path: Path) -> None:
    """A field with its type, default, choices and old names: as a flag, as a sweep's key and in run.json's command."""
    from sphere.commands.sweep_job import job_of, schema

    actions = {action.dest: action for action in evaluate.parser()._actions}
    keys = {field.name: field for field in dataclasses.fields(schema())}
    sweep = {"sweep_dir": str(tmp_path), "generation_interval": 0, "devices": []}
    for name, setting in settings().items():
        if name != "dataset_size_limit":  # whose default depends on whether facts are given
            assert actions[name].default == setting.default
        assert (actions[name].choices or ()) == setting.choices
        assert actions[name].option_strings == [f"--{spelled}" for spelled in (name, *setting.old_names)]
        if name in ("output_dir", "continue_from_run", "overwrite"):  # a sweep decides these itself
            assert name not in keys
            continue
        if name != "dataset_size_limit":
            assert keys[name].default == setting.default
        assert all(keys[old].default is None for old in setting.old_names)
        other = {bool: True, int: 7, float: 0.25, str: (setting.choices or ("z",))[-1]}[setting.kind]
        config = RunConfig(**{name: other})
        if name == "facts":  # of which all are meant
            config = dataclasses.replace(config, dataset_size_limit=None)
        words = shlex.split(command_of(dataclasses.asdict(config)))
        assert words[4:] == [f"--{name}" if other is True else f"--{name}={other}"]
        assert config_of(evaluate.parser().parse_args(words[4:])) == config
        assert getattr(job_of(sweep | {name: other}).config, name) == other


@pytest.mark.parametrize("value", ["model", "bfloat16"])
def test_the_old_name_of_a_setting_still_counts(value: str) -> None:
    """As a flag, as a key of a sweep, and in run.json and job.json."""
    from sphere.commands.sweep_job import job_of

    assert config_of(evaluate.parser().parse_args([f"--z_products={value}"])).z_matmul_dtype == value
    sweep = {"sweep_dir": "x", "generation_interval": 0, "devices": [], "z_matmul_dtype": "model"}
    assert job_of(sweep | {"z_products": value}).config.z_matmul_dtype == value
    assert job_of(sweep | {"z_products": None}).config.z_matmul_dtype == "model"
    assert by_new_names({"z_products": value, "seed": 3}) == {"z_matmul_dtype": value, "seed": 3}
    assert command_of({"z_products": "bfloat16"}).endswith("sphere edit --z_matmul_dtype=bfloat16")


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"num_edits": 0}, "num_edits must be at least 1, got 0"),
        ({"dataset_size_limit": -1}, "dataset_size_limit must be at least 1, got -1"),
        (
            {"ds_name": "foo"},
            "ds_name is one of starter, facts_zh, cf, mcf, zsre, mquake_cf, ripple_recent, ripple_random, "
            "ripple_popular, wiki_big_edit, ultra_edit_bench, knowedit_recent, knowedit_counterfact, "
            "hallu_edit_bench, facts, got 'foo'",
        ),
        ({"z_matmul_dtype": "int8"}, "z_matmul_dtype is one of model, bfloat16, got 'int8'"),
        ({"on_breakdown": "go"}, "on_breakdown is one of stop, continue, got 'go'"),
    ],
)
def test_what_a_flag_refuses_a_configuration_refuses_too(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(SphereError, match=says) as error:
        RunConfig(**settings_).check()
    assert error.value.arguments == tuple(settings_)
    assert "--" not in str(error.value)


@pytest.mark.parametrize("module", [evaluate, evaluate_each_epoch, tune])
def test_every_flag_is_explained(module: Any) -> None:
    parser = module.parser()
    assert parser.description
    assert all(action.help for action in parser._actions)
    help_text = parser.format_help()
    for action in parser._actions:
        shown = action.default not in (None, argparse.SUPPRESS) and action.default is not False
        assert not shown or f"(default: {action.default})" in " ".join(help_text.split())
    assert max(map(len, help_text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("module", "words"),
    [
        *[("experiments.evaluate", []), ("scripts.evaluate_each_epoch", []), ("scripts.report", [])],
        *[("experiments.sweep", []), ("experiments.tune", []), ("sphere", [])],
        *[("sphere", [name]) for name in COMMANDS],
    ],
)
def test_help_does_not_wait_for_pytorch(module: str, words: list[str]) -> None:
    code = (
        f"import runpy, sys; sys.argv = {['x', *words, '--help']}\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (f"sphere {words[0]} " if words else module.rpartition(".")[0]) in run.stdout


def test_doors_and_subcommands_are_the_same_code() -> None:
    from experiments import sweep as sweep_door
    from scripts import report as report_door
    from sphere.commands import edit, report, score, sweep
    from sphere.commands import tune as tune_command

    assert (evaluate.main, evaluate_each_epoch.main) == (edit.main, score.main)
    assert tune.main == tune_command.main
    assert (sweep_door.main, report_door.main) == (sweep.main, report.main)


def test_a_command_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    code, out, err = command(sphere.commands.main.main, ["edt"], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err == f"error: no command 'edt': use one of {', '.join(COMMANDS)}; see --help.\n"


def test_methods_and_plan_print_what_the_flags_of_edit_print(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    for name, flag in (("methods", "--list_methods"), ("plan", "--dry_run")):
        words = tiny.flags() if name == "plan" else [f"--hparams_dir={tiny.folder / 'hparams'}"]
        code, out, _ = command(sphere.commands.main.main, [name, *words], monkeypatch, capsys)
        by_flag, other, _ = command(evaluate.main, [flag, *words], monkeypatch, capsys)
        assert code == by_flag == 0
        assert out.splitlines()[:9] == other.splitlines()[:9]  # a plan ends with speeds as it measured them


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
        alpha = "0.5" if paragraph.splitlines()[0] in ("AlphaEdit", "BetaEdit", "NAS") else "0.8"
        assert f"alpha {alpha}, beta_hse 0.5" in paragraph
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
    assert config_of(evaluate.parser().parse_args(words[4:])) == config


# ---- errors ----


def caused(message: str, argument: str) -> SphereError:
    """An error that says where another one came from."""
    error = SphereError(message)
    error.__cause__ = SphereError("It is.", argument=argument)
    return error


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (SphereError("It\nis\n  so."), 2, "error: It is so."),
        (SphereError("It is 3.", argument="seed"), 2, "error: It is 3 (--seed)."),
        (SphereError("It is.", argument=("seed", "alpha")), 2, "error: It is (--seed, --alpha)."),
        (caused("In a file: it is.", "alpha"), 2, "error: In a file: it is (--alpha)."),
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


def test_a_command_line_of_keys_spells_them_as_keys() -> None:
    assert with_flags(SphereError("It is 3.", argument="seed"), "{}=") == "It is 3 (seed=)."


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
