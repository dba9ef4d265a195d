"""Runs that go on with further facts: the very weights of a run that had all of them, killed in between or not."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from killed import Stopped, stopped
from tiny_run import TinyRun, command, contents, records
from transformers import PreTrainedTokenizerBase

import sphere.runs.more_facts
from sphere.checkpoints import read_config, read_weights, write_config
from sphere.commands.main import main
from sphere.errors import SphereError
from sphere.evaluation.undo import UNDO, Choice, change
from sphere.runs.config import RunConfig
from sphere.runs.facts_file import read_run_facts
from sphere.runs.folder import foreign_files
from sphere.runs.ledger import read_entries, undone_cases
from sphere.runs.more_facts import continue_run
from sphere.runs.remake import commands_of
from sphere.runs.run import execute

FIRST, MORE = 4, 3  # facts of the run, and those that are added; batches of 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """Files of tiny runs, and tables of facts: all.csv, first.csv and more.csv, which together are all."""
    world = TinyRun(tmp_path_factory.mktemp("more"), tiny_tokenizer)
    facts = [record["requested_rewrite"] for record in records(FIRST + MORE)]
    rows = [(f["prompt"], f["subject"], f["target_new"]["str"], f["target_true"]["str"]) for f in facts]
    for name, some in ("all", rows), ("first", rows[:FIRST]), ("more", rows[FIRST:]):
        write(world.folder / f"{name}.csv", some)
    return world


def write(path: Path, rows: list[tuple[str, ...]]) -> Path:
    """A table of facts."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "subject", "target_new", "target_true"), *rows])
    return path


def settings(tiny: TinyRun, name: str, output: str, **more: object) -> RunConfig:
    """A run of one of the tables."""
    return tiny.config(output, facts=str(tiny.folder / f"{name}.csv"), dataset_size_limit=None, **more)


def given(tiny: TinyRun, **more: object) -> dict[str, object]:
    """What is given with the further facts."""
    return {"facts": str(tiny.folder / "more.csv"), "device": "cpu", **more}


@pytest.fixture(scope="module")
def whole(tiny: TinyRun) -> Path:
    """A run of all facts at once."""
    return execute(settings(tiny, "all", "whole")).folder


@pytest.fixture(scope="module")
def first(tiny: TinyRun) -> Path:
    """A run of the first facts, which tests copy."""
    return execute(settings(tiny, "first", "first")).folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """A run of the first facts."""
    return Path(shutil.copytree(first, tmp_path / "run"))


def check_same(folder: Path, whole: Path) -> None:
    """The same checkpoints and resume point, byte for byte, and a ledger of the same edits."""
    assert contents(folder) == contents(whole)
    assert contents(folder, "resume*") == contents(whole, "resume*")
    edits, expected = ([(e.batch, e.n_edits, e.requests) for e in read_entries(f)] for f in (folder, whole))
    assert edits == expected
    assert not foreign_files(folder)


def test_a_finished_run_goes_on_as_if_it_had_had_all_facts(run: Path, whole: Path, tiny: TinyRun) -> None:
    found, config = continue_run(run, given(tiny))
    assert [report.n_edits for report in found.reports] == [6, 7]
    assert config.num_edits == 2
    check_same(run, whole)
    assert [r.case_id for r in found.records] == read_config(run)["case_ids"] == [1, 2, 3, 4, 5, 6, 7]
    assert read_config(run)["parts"] == [0, FIRST]
    assert [r.request for r in read_run_facts(run)[0]] == [r.request for r in found.records]
    again, _ = continue_run(run, given(tiny))  # the same facts are not added twice
    assert not again.reports
    check_same(run, whole)


def test_it_may_be_broken_off_and_goes_on_with_the_same_command(
    run: Path, whole: Path, tiny: TinyRun, monkeypatch
) -> None:
    with stopped(monkeypatch, 2):
        continue_run(run, given(tiny))
    continue_run(run, given(tiny))
    check_same(run, whole)


def test_a_stopped_run_ends_first(whole: Path, tiny: TinyRun, monkeypatch) -> None:
    config = settings(tiny, "first", "stopped")
    with stopped(monkeypatch, 1):
        execute(config)
    folder = next(path.parent for path in Path(config.output_dir).rglob("run.json"))
    continue_run(folder, given(tiny))
    check_same(folder, whole)


@contextmanager
def killed_before_run_json(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kill between facts.json and run.json."""

    def killed(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("sphere.runs.more_facts.write_config", killed)
        with pytest.raises(Stopped):
            yield


def test_a_kill_before_run_json_leaves_the_run(run: Path, whole: Path, tiny: TinyRun, monkeypatch) -> None:
    with killed_before_run_json(monkeypatch):
        continue_run(run, given(tiny))
    assert read_config(run)["case_ids"] == [1, 2, 3, 4]
    done, _ = continue_run(run, {"device": "cpu"})
    assert not done.reports
    continue_run(run, given(tiny))
    check_same(run, whole)


def test_a_run_of_a_dataset_takes_facts_and_is_scored_with_them(tiny: TinyRun, monkeypatch, capsys) -> None:
    folder = execute(tiny.config("dataset", dataset_size_limit=FIRST)).folder
    words = ["edit", f"--continue={folder}", f"--facts={tiny.folder / 'more.csv'}", "--device=cpu"]
    code, out, err = command(main, words, monkeypatch, capsys)
    assert code == 0, err
    summary = json.loads((folder / "summary" / "summary.json").read_text())
    last = summary["checkpoints"][-1]
    assert (last["n_edits"], last["metrics"]["n_cases"]) == (7, 7)
    assert "scores" in out.lower()
    begun, added = commands_of(read_config(folder), folder)
    assert f"--dataset_size_limit={FIRST}" in begun
    assert added.split(" ", 3)[3].split() == words
    kept = read_run_facts(folder)[0]
    assert [r.case_id for r in kept] == [0, 1, 2, 3, 4, 5, 6]
    assert kept[0].generation_prompts
    score = [
        "score",
        f"--weight_folder={folder}",
        "--ds_name=facts",
        f"--model_name={tiny.model}",
        "--device=cpu",
    ]
    code, _, err = command(main, score, monkeypatch, capsys)
    assert code == 0, err


def test_a_table_of_the_user_is_never_written_over(tiny: TinyRun, monkeypatch, tmp_path) -> None:
    folder = execute(tiny.config("table", dataset_size_limit=2)).folder
    table = folder / "facts.json"
    rows = [{"prompt": "{} is in", "subject": "Ann", "target_new": "Rome", "target_true": "Paris"}]
    table.write_text(json.dumps(rows))
    before = contents(folder, "*")
    for facts in table, tiny.folder / "more.csv":
        with pytest.raises(SphereError, match=r"holds facts\.json, which no run wrote there .* move it"):
            continue_run(folder, given(tiny, facts=str(facts)))
    assert contents(folder, "*") == before
    table.rename(tmp_path / "mine.json")
    with killed_before_run_json(monkeypatch):
        continue_run(folder, given(tiny, facts=str(tmp_path / "mine.json")))
    found, _ = continue_run(folder, given(tiny, facts=str(tmp_path / "mine.json")))  # what is left is ours
    assert [record.request.subject for record in found.records[2:]] == ["Ann"]


def test_facts_go_into_weights_without_what_is_undone(run: Path, whole: Path, tiny: TinyRun) -> None:
    change(run, UNDO, Choice(batch=1))
    continue_run(run, given(tiny))
    assert undone_cases(run, 7) == {1, 2}
    now, with_them = (read_weights(f / "edit_7.safetensors") for f in (run, whole))
    original = read_weights(run / "edit_0.safetensors")
    one = read_weights(whole / "edit_2.safetensors")
    for name in now:
        assert (with_them[name] - now[name]).norm() > 0.3 * (one[name] - original[name]).norm()


def test_what_cannot_be_continued_is_said_and_leaves_the_run(
    run: Path, tiny: TinyRun, tmp_path, monkeypatch, capsys
) -> None:
    before = contents(run, "*")
    facts = f"--facts={tiny.folder / 'more.csv'}"

    def bad(*words: str) -> str:
        code, _, err = command(main, ["edit", *words, "--device=cpu"], monkeypatch, capsys)
        assert code == 2
        return err

    said = bad(f"--continue={run}", facts, "--alg_name=MEMIT", "--num_edits=5")
    assert (
        "has its own alg_name, num_edits: leave that out, or begin a new run (--alg_name, --num_edits)"
        in said
    )
    assert "not of one that is continued" in bad(f"--continue={run}", facts, "--dry_run")
    said = bad(f"--continue={run}", facts, "--num_edits=20", "--alg_name=AlphaEdit", "--ds_name=facts")
    assert "has its own num_edits: leave that out" in said  # a default, too, where it is not the run's
    said = bad(f"--continue={run}", "--dataset_size_limit=3", "--on_bad_record=skip", "--overwrite")
    assert "its own on_bad_record, dataset_size_limit, overwrite: leave" in said  # no further facts
    assert "no run to continue" in bad(f"--continue={tmp_path / 'none'}", facts)
    assert "No table of facts" in bad(f"--continue={run}", f"--facts={tmp_path / 'none.csv'}")
    long = write(tmp_path / "long.csv", [("{} is in " + "a" * 300, "Ann", "Rome", "Paris")])
    assert "Longer than the 256 positions" in bad(f"--continue={run}", f"--facts={long}")
    assert "batches end at 2, 4, 6, 7" in bad(f"--continue={run}", facts, "--checkpoints=3")
    with pytest.raises(SphereError, match="batch_tokens must be at least 1"):
        continue_run(run, given(tiny, batch_tokens=0))
    assert contents(run, "*") == before
    write_config(run, {**read_config(run), "second_moments": "0" * 64})
    before = contents(run, "*")
    assert "other second moments than those of today" in bad(f"--continue={run}", facts)
    assert contents(run, "*") == before
    (run / "resume.safetensors").unlink()
    assert "resume point" in bad(f"--continue={run}", facts)
    assert read_config(run)["case_ids"] == [1, 2, 3, 4]


def test_the_device_is_the_runs_own(run: Path, monkeypatch) -> None:
    asked: list[tuple] = []

    def start(*device: str | None) -> None:
        asked.append(device)
        raise Stopped

    monkeypatch.setattr(sphere.runs.more_facts, "start", start)
    for given in ({}, {"device": "cuda:1"}):
        with pytest.raises(Stopped):
            continue_run(run, given)
    assert asked == [("cpu", None), ("cuda:1", None)]


def test_another_model_is_refused(run: Path, tiny: TinyRun, tmp_path) -> None:
    from conftest import tiny_llama

    shutil.copytree(tiny.model, tmp_path / "tiny")
    tiny_llama(seed=1).save_pretrained(tmp_path / "tiny")
    with pytest.raises(SphereError, match="other settings \\(model\\)"):
        continue_run(run, given(tiny, model_name=str(tmp_path / "tiny")))
    assert read_config(run)["case_ids"] == [1, 2, 3, 4]
