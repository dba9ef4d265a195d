"""What lies in a run's folder: nothing is lost that the run did not write; one run gives way to the next as a whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import killed
import pytest
import torch
from task_data import write_task_data
from tiny_run import TinyRun, contents
from transformers import PreTrainedTokenizerBase

import sphere.files
from sphere.checkpoints import list_checkpoints, read_weights
from sphere.downstream import run_downstream
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.report import make_report
from sphere.runs.config import RunConfig
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute

SHORT = {"alg_name": "FT", "dataset_size_limit": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with a finished run of two batches."""
    tiny = TinyRun(tmp_path_factory.mktemp("folder"), tiny_tokenizer, 6)
    execute(tiny.config("done", **SHORT))
    return tiny


@pytest.fixture
def tiny(base: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy of that world."""
    return base.copy(tmp_path)


def everything(folder: Path) -> dict[str, bytes]:
    """All files, but for the lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def published(folder: Path) -> None:
    """What the published code leaves, scored: no run.json."""
    folder.mkdir(parents=True)
    weights = {"model.layers.1.mlp.down_proj.weight": torch.ones(32, 48)}
    for n in (2, 6):
        torch.save({"weight": weights}, folder / f"edit_{n}.pth")
    for name in ("summary/summary.json", "rect_eval/results.txt", "report/report.html"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("mine")


# ---- folders that hold what no run wrote ----


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_published_run_is_never_cleared(overwrite: bool, tiny: TinyRun) -> None:
    config = tiny.config("new", **SHORT, overwrite=overwrite)
    folder = folder_of(config)
    published(folder)
    before = everything(folder)
    with pytest.raises(SphereError, match=r"holds edit_2\.pth, edit_6\.pth.*move them elsewhere"):
        execute(config)
    assert everything(folder) == before


def test_continuing_a_published_run_advises_nothing_that_deletes(tiny: TinyRun) -> None:
    config = tiny.config("new", **SHORT, continue_from_run=True)
    folder = folder_of(config)
    published(folder)
    before = everything(folder)
    with pytest.raises(
        SphereError, match=r"no run to continue.*but edit_2\.pth.*another output_dir"
    ) as refused:
        execute(config)
    assert "begin" not in str(refused.value)
    assert everything(folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "summary/notes.txt", ".DS_Store", "tensorboard/mine"])
def test_foreign_files_refuse_a_run_or_stay(name: str, tiny: TinyRun) -> None:
    config = tiny.config("new", **SHORT)
    path = folder_of(config) / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(SphereError, match=f"holds {name}, which no run wrote"):
        execute(config)
    assert everything(folder_of(config)) == {name: b"mine"}
    execute(replace(config, overwrite=True))
    execute(replace(config, overwrite=True))
    assert path.read_text() == "mine"


def test_harmless_leftovers_refuse_nothing(tiny: TinyRun) -> None:
    """A sweep's own notes, a lock, temporary files of a killed writer, empty folders."""
    config = tiny.config("new", **SHORT)
    folder = folder_of(config)
    (folder / "summary").mkdir(parents=True)
    for name in (".lock", ".lock.json", "job.json", ".run.json.abcd_123.part"):
        (folder / name).write_text("{}")
    execute(config)
    assert (folder / "job.json").read_text() == "{}"
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("content", ["{}", '{"name": "of another program"}', "[1]"])
def test_another_programs_run_json_vouches_for_nothing(content: str, tiny: TinyRun) -> None:
    config = tiny.config("new", **SHORT, overwrite=True)
    folder = folder_of(config)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    (folder / "edit_2.safetensors").write_text("mine")
    before = everything(folder)
    with pytest.raises(SphereError):
        execute(config)
    assert everything(folder) == before


def test_overwriting_removes_all_of_the_old_run_and_nothing_else(tiny: TinyRun) -> None:
    """Edited, scored, run on a downstream task, reported, with TensorBoard events; then of other batches anew."""
    config = tiny.config("new", alg_name="FT", tensorboard=True, log_energy_every=1)
    run = execute(config)
    run.editor.revert()
    evaluate_run(run.model, run.tokenizer, run.folder, run.records, progress=False)
    data = tiny.folder / "data"
    write_task_data(data)
    run_downstream(run.model, run.tokenizer, run.folder, data, tasks=["nli"])
    make_report([run.folder], progress=False)
    del run
    folder = folder_of(config)
    lm_eval = folder / "rect_eval" / "edit_2" / "lm_eval"
    lm_eval.mkdir()
    for name in ("copa.json", "copa_samples.jsonl"):
        (lm_eval / name).write_text("{}")
    kept = {"summary/notes.txt", "report/figures/mine.png", "rect_eval/edit_2/mine.jsonl", "notes.txt"}
    for name in kept:
        (folder / name).write_text("mine")
    execute(replace(config, overwrite=True, dataset_size_limit=2, tensorboard=False))
    new = {"run.json", "batches.jsonl", "edit_0.safetensors", "edit_2.safetensors", "resume.safetensors"}
    new |= {"ledger/batch_2.safetensors"}
    assert everything(folder).keys() == new | kept
    assert all((folder / name).read_text() == "mine" for name in kept)
    places = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir()}
    assert places == {"ledger", "summary", "report", "report/figures", "rect_eval", "rect_eval/edit_2"}


@pytest.mark.parametrize("name", ["edit_3.safetensors", "edit_2.pth", "edit_2", "summary/cases_edit_3.jsonl"])
def test_a_file_that_the_old_run_did_not_write_is_not_overwritten(name: str, tiny: TinyRun) -> None:
    """Its batches end at 2 and 4; what else looks like a run's file would be taken for the new run's."""
    config = tiny.config("done", **SHORT, overwrite=True)
    folder = folder_of(config)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = everything(folder)
    with pytest.raises(SphereError, match=f"{name}, which no run.json there vouches for"):
        execute(config)
    assert everything(folder) == before


def test_links_are_not_followed(tiny: TinyRun) -> None:
    config = tiny.config("done", **SHORT, overwrite=True)
    elsewhere = tiny.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "summary.json").write_text("mine")
    (folder_of(config) / "summary").symlink_to(elsewhere)
    execute(config)
    assert (elsewhere / "summary.json").read_text() == "mine"


def test_a_run_json_cannot_have_other_files_removed(tiny: TinyRun) -> None:
    """A folder from somebody else, which claims to be in the middle of its beginning."""
    config = tiny.config("done", **SHORT, continue_from_run=True)
    folder = folder_of(config)
    victim = folder.parent / "victim.txt"
    for path in (victim, folder / "notes.txt"):
        path.write_text("mine")
    content = json.loads((folder / "run.json").read_text())
    names = ["../victim.txt", str(victim), "notes.txt"]
    (folder / "run.json").write_text(json.dumps({**content, "replaced": names}))
    execute(config)
    assert victim.read_text() == (folder / "notes.txt").read_text() == "mine"


def test_a_report_keeps_figures_of_others(tiny: TinyRun) -> None:
    folder = folder_of(tiny.config("done", **SHORT))
    figures = folder / "report" / "figures"
    figures.mkdir(parents=True)
    for name in ("mine.png", "retention.svg"):  # one of ours, of a report with other parts
        (figures / name).write_text("old")
    make_report([folder], progress=False)
    assert (figures / "mine.png").read_text() == "old"
    assert not (figures / "retention.svg").exists()


# ---- a new run takes the place of an old one ----


def states(base: TinyRun, output: str) -> tuple[RunConfig, dict[str, bytes], dict[str, bytes]]:
    """Settings that overwrite the finished run by another; the files of the old one, and of the new one alone."""
    config = base.config(output, **SHORT, seed=5, overwrite=True)
    old = everything(folder_of(base.config("done", **SHORT)))
    return config, old, everything(execute(base.config("alone", **SHORT, seed=5, overwrite=True)).folder)


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("edit_")}


def test_killed_before_every_step_while_a_new_run_begins(base: TinyRun, tmp_path: Path) -> None:
    """The old run is whole, or the new one goes on to its own end; never something of both."""
    tiny = base.copy(tmp_path)
    config, old, new = states(tiny, "steps")
    source, folder = folder_of(tiny.config("done", **SHORT)), folder_of(config)
    outcomes = []
    for step in range(1, 26):  # the last ones fall into its first batches
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        assert killed.kill_after(killed.start(config, fatal_step=step), killed.SECONDS)
        begun = json.loads((folder / "run.json").read_text())
        outcomes.append(begun["seed"])
        if begun["seed"] == 0:
            found = everything(folder)
            assert {name: found[name] for name in old} == old
            assert list_checkpoints(folder)[-1].n_edits == 4
            continue
        execute(replace(config, overwrite=False, continue_from_run=True))
        assert weights_of(everything(folder)) == weights_of(new)
        assert everything(folder).keys() == new.keys()
    assert outcomes == sorted(outcomes)
    assert outcomes.count(0) >= 4
    assert outcomes.count(5) >= 8


@pytest.mark.parametrize("room", range(10))
def test_a_full_disk_while_a_new_run_begins(
    room: int, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, old, new = states(tiny, "done")
    folder, synced, calls = folder_of(config), os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(handle)

    with monkeypatch.context() as patch:
        patch.setattr(sphere.files.os, "fsync", fsync)
        with pytest.raises((SphereError, OSError), match="No space left"):
            execute(config)
    if json.loads((folder / "run.json").read_text())["seed"] == 0:
        assert everything(folder) == old
    else:
        execute(replace(config, overwrite=False, continue_from_run=True))
        assert weights_of(everything(folder)) == weights_of(new)


def test_an_error_before_a_new_run_begins_leaves_the_old_one(tiny: TinyRun) -> None:
    config = tiny.config("done", **SHORT, overwrite=True)
    before = everything(folder_of(config))
    (tiny.model / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(SphereError, match="Cannot load"):
        execute(config)
    assert everything(folder_of(config)) == before


def test_nothing_is_left_where_nothing_began(tiny: TinyRun) -> None:
    with pytest.raises(SphereError, match="no run to continue"):
        execute(tiny.config("new/er", **SHORT, continue_from_run=True))
    assert not (tiny.folder / "new").exists()


def test_lost_original_weights_are_written_again(tiny: TinyRun) -> None:
    config = tiny.config("done", **SHORT, continue_from_run=True)
    path = folder_of(config) / "edit_0.safetensors"
    before = read_weights(path)
    path.unlink()
    execute(config)
    assert all(torch.equal(weight, before[name]) for name, weight in read_weights(path).items())
    assert contents(folder_of(config)).keys() == {
        "edit_0.safetensors",
        "edit_2.safetensors",
        "edit_4.safetensors",
    }
