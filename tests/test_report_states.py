"""What a report says of runs whose scores end before their edits, of their rules, and how they are made again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from fake_runs import fake_run

from sphere.checkpoints import read_config, write_config
from sphere.commands.edit import parser
from sphere.evaluation.summary import cell, percent
from sphere.files import read_json, write_json
from sphere.report.collect import RunData, load_runs, measure
from sphere.report.commands import edit_commands, missing
from sphere.report.figures import looks, retention
from sphere.report.pairs import is_plain
from sphere.report.style import drawing
from sphere.report.tables import overview, tables, thirds
from sphere.report.weight_figures import cosines
from sphere.runs.config import RunConfig
from sphere.runs.job import Job
from sphere.runs.sweep_table import collect

ALONE = {"scored": False, "downstream": False, "batches": 1}


def scored_up_to(folder: Path, n_edits: int) -> Path:
    """The run, without the results of later checkpoints."""
    path = folder / "summary" / "summary.json"
    summary = read_json(path, "summary")
    rows = [row for row in summary["checkpoints"] if row["n_edits"] <= n_edits]
    write_json(path, summary | {"checkpoints": rows})
    path = folder / "rect_eval" / "summary.json"
    states = read_json(path, "summary")["checkpoints"]
    states = {name: state for name, state in states.items() if state["n_edits"] <= n_edits}
    write_json(path, {"num_tests": 50, "checkpoints": states})
    return folder


def loaded(*folders: Path) -> list[RunData]:
    runs = load_runs(folders)
    measure(runs, progress=False)
    return runs


def described(folder: Path, **changes: Any) -> Path:
    """The run with other entries in its run.json."""
    write_config(folder, read_config(folder) | changes)
    return folder


# ---- scores of an earlier checkpoint ----


def test_a_row_is_of_one_state_and_says_which(tmp_path: Path) -> None:
    (run,) = loaded(scored_up_to(fake_run(tmp_path, batches=3), 10))
    head, row = overview([run]).lines
    cells = dict(zip(head, row, strict=True))
    change = sum(run.energy_changes[10].values()) / 2
    assert cells["edits"] == "30"
    assert cells["score (%)"] == cell(run.rows[1]["metrics"]["score"]) + " after 10"
    assert cells["energy change"] == percent(change) + " after 10"
    assert thirds([run], "").lines[1][:2] == [run.label, "10"]
    titles = [table.title for table in tables([run])]
    assert not [title for title in titles if "after all edits" in title or "last edit" in title]
    with drawing():
        drawn = retention([run], looks([run]), "")
        assert drawn is not None
        assert drawn.figure.axes[0].get_legend_handles_labels()[1] == [f"{run.label}, after 10 edits"]
        assert "all edits" not in drawn.title + drawn.figure.axes[0].get_ylabel()


def test_what_is_not_scored_to_the_end_is_missing(tmp_path: Path) -> None:
    (run,) = loaded(scored_up_to(fake_run(tmp_path, batches=3), 10))
    (scores, score), (tasks, downstream) = missing([run])
    assert "its scores end at 10 of 30 edits" in scores
    assert "its downstream results end at 10 of 30 edits" in tasks
    assert {"--ds_name=mcf", "--only_checkpoints=10,last"} <= set(shlex.split(score or ""))
    assert "--only_checkpoints=last" in shlex.split(downstream or "")
    assert not missing(loaded(fake_run(tmp_path / "whole", batches=1)))


def test_a_run_whose_later_weights_were_removed_has_its_edits(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, batches=3)
    for n_edits in (20, 30):
        (folder / f"edit_{n_edits}.safetensors").unlink()
    (run,) = loaded(folder)
    assert run.n_edits == run.scored_edits == 30
    assert not missing([run])
    with drawing():
        assert cosines([run], looks([run])) is not None


# ---- rules ----


@pytest.mark.parametrize(
    ("rules", "of_the_file", "beta_hse", "hook", "plain"),
    [
        (None, None, 0.5, True, False),
        (None, None, 0, False, True),
        (None, ["revive"], 0.5, False, False),
        (None, ["rect", "sphere"], 0.5, True, False),
        ("rect, sphere", None, 0.5, True, False),
        ("rect,sphere", ["revive"], 0.5, True, False),  # the run's own go before the file's
        ("", ["sphere"], 0.5, False, False),
        ("rect, sphere", None, 0, False, False),
    ],
)
def test_sphere_is_what_the_rules_say(tmp_path, rules, of_the_file, beta_hse, hook, plain) -> None:
    folder = fake_run(tmp_path, "MEMIT", beta_hse, rules=rules, **ALONE)
    hparams = read_config(folder)["hparams"] | ({"rules": of_the_file} if of_the_file else {})
    (run,) = load_runs([described(folder, hparams=hparams)])
    assert run.label == ("MEMIT + SPHERE" if hook else "MEMIT")
    head, row = overview([run]).lines
    assert (row[head.index("β")], row[head.index("α")]) == (("0.5", "0.8") if hook else ("-", "-"))
    assert is_plain(run) == plain


def test_rules_of_the_file_tell_runs_apart(tmp_path: Path) -> None:
    plain, revive = (fake_run(tmp_path / name, "MEMIT", b, **ALONE) for name, b in (("p", 0), ("r", 0.5)))
    described(revive, hparams=read_config(revive)["hparams"] | {"rules": ["revive"]})
    assert [run.label for run in load_runs([plain, revive])] == ["MEMIT", "MEMIT, rules revive"]


def test_a_sweep_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "hparams" / "MEMIT").mkdir(parents=True)
    (tmp_path / "hparams" / "MEMIT" / "own.json").write_text(json.dumps({"rules": ["revive"]}))
    for beta, rules in (0.0, None), (0.5, None), (0.5, "rect, sphere"):
        places = {"output_dir": str(tmp_path), "hparams_dir": str(tmp_path / "hparams")}
        own = {"alg_name": "MEMIT", "hparams_fname": "own.json", "beta_hse": beta, "rules": rules}
        job = Job(RunConfig(**places, **own))
        job.folder.mkdir(parents=True)
        content = {"status": "failed", "error": "x", "seconds": 0.0, "settings": job.settings}
        write_json(job.folder / "job.json", content)
    labels = [row["label"] for row in collect(tmp_path)]
    assert labels == [
        "MEMIT beta_hse=0 rules=None",
        "MEMIT beta_hse=0.5 rules=None",
        "MEMIT + SPHERE beta_hse=0.5 rules=rect, sphere",
    ]


# ---- a run that was continued ----


def test_a_continued_run_is_made_again_by_all_its_commands(tmp_path: Path) -> None:
    """Its run.json names the last of its tables, and its summary the dataset of before."""
    folder = scored_up_to(fake_run(tmp_path, batches=3, dataset_size_limit=10), 10)
    begun = "python -m sphere edit --ds_name=mcf --dataset_size_limit=10 --log_energy_every=0"
    second = f"python -m sphere edit --continue={folder} --facts=more.csv --subjects=names.txt"
    events = [
        {"facts": "old.csv", "n_edits": 10, "when": "-"},  # written by an earlier version
        {"facts": "more.csv", "n_edits": 20, "when": "-", "command": second},
    ]
    described(folder, ds_name="facts", facts="more.csv", parts=[0, 10, 20], continued=events, command=begun)
    (folder / "batches.jsonl").write_text('{"batch": 0, "n_edits": 10, "layers": {}}\n')
    (run,) = loaded(folder)
    commands = [begun, f"python -m sphere edit --continue={folder} --facts=old.csv", second]
    assert edit_commands(run) == commands
    for command in commands:
        parser().parse_args(shlex.split(command)[4:])
    said = {sentence: command or "" for sentence, command in missing([run])}
    (score,) = (command for sentence, command in said.items() if "its scores end at 10 of 30" in sentence)
    assert "--ds_name=facts" in score
    assert "dataset_size_limit" not in score
    (again,) = (command for sentence, command in said.items() if "were not logged" in sentence)
    parts = [parser().parse_args(shlex.split(part)[4:]) for part in again.split(" && ")]
    assert [part.log_energy_every for part in parts] == [1, 1, 1]
    assert [part.facts for part in parts] == [None, "old.csv", "more.csv"]
