"""One process at a time in a run's folder; the others are told which."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import TinyRun
from transformers import PreTrainedTokenizerBase

from sphere.downstream import run_downstream
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.lock import FolderInUseError, locked
from sphere.models import load_model
from sphere.report import make_report
from sphere.runs.job import Job
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute
from sphere.runs.sweep import run_job

ROOT = Path(__file__).parents[1]
SECONDS = 120
SETTINGS = {"alg_name": "FT", "dataset_size_limit": 4}

# A run that stands still, with its folder in hand, before its second batch.
PAUSED_RUN = """
import json, sys, time
from sphere.editor import Editor
from sphere.runs.run import RunConfig, execute

edit = Editor.edit
def paused(self, *arguments):
    if self.n_edits == 2:
        print("paused", flush=True)
        sys.stdin.readline()
    return edit(self, *arguments)
Editor.edit = paused
execute(RunConfig(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def tiny(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    return TinyRun(tmp_path, tiny_tokenizer, n_records=4)


@contextmanager
def paused_run(tiny: TinyRun) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of a run; it ends when a line is written to it, or with the block."""
    config = json.dumps(vars(tiny.config(**SETTINGS)))
    command = [sys.executable, "-c", PAUSED_RUN, config]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    bound = threading.Timer(SECONDS, process.kill)
    bound.start()
    try:
        assert process.stdout
        assert process.stdout.readline() == "paused\n"
        yield process
    finally:
        bound.cancel()
        process.kill()
        process.wait(SECONDS)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_at_one_run(tiny: TinyRun) -> None:
    """Edited, continued, replaced, scored by another process meanwhile: each is refused and harms nothing."""
    config = tiny.config(**SETTINGS)
    folder = folder_of(config)
    model, tokenizer = load_model(tiny.model, "cpu")
    records = execute(tiny.config("alone", **SETTINGS)).records
    with paused_run(tiny) as other:
        before = contents(folder)
        attempts = [
            lambda: execute(config),
            lambda: execute(tiny.config(**SETTINGS, continue_from_run=True)),
            lambda: execute(tiny.config(**SETTINGS, overwrite=True)),
            lambda: evaluate_run(model, tokenizer, folder, records, progress=False),
            lambda: run_downstream(model, tokenizer, folder, tiny.folder / "data", tasks=[]),
        ]
        for attempt in attempts:
            with pytest.raises(
                FolderInUseError, match=rf"in use by process {other.pid} on .* since \d{{4}}-"
            ):
                attempt()
        assert contents(folder) == before
        make_report([folder], progress=False)  # reading is possible
        other.communicate("\n", timeout=SECONDS)
        assert other.returncode == 0
    lines = (folder / "batches.jsonl").read_text().splitlines()
    assert [json.loads(line)["batch"] for line in lines] == [0, 1]
    alone = folder_of(tiny.config("alone", **SETTINGS))
    for n in (0, 2, 4):
        assert (folder / f"edit_{n}.safetensors").read_bytes() == (
            alone / f"edit_{n}.safetensors"
        ).read_bytes()


def test_a_killed_process_blocks_nobody(tiny: TinyRun) -> None:
    with paused_run(tiny) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait(SECONDS)
        run = execute(tiny.config(**SETTINGS, continue_from_run=True))
    assert [report.n_edits for report in run.reports] == [4]
    assert not (run.folder / ".lock.json").exists()


def test_a_job_of_a_sweep_holds_its_folder_itself(tiny: TinyRun) -> None:
    """It edits and scores with the lock in hand; somebody else's keeps it out."""
    job = Job(tiny.config("sweep", **SETTINGS))
    with locked(job.folder):
        result: list[dict] = []
        thread = threading.Thread(target=lambda: result.append(run_job(job)))
        thread.start()
        thread.join(SECONDS)
        assert result[0]["status"] == "busy"
        assert f"process {os.getpid()}" in result[0]["error"]
    assert run_job(job)["status"] == "finished"


def test_a_job_note_of_others_is_kept(tiny: TinyRun) -> None:
    job = Job(tiny.config("sweep", **SETTINGS))
    job.folder.mkdir(parents=True)
    (job.folder / "job.json").write_text('{"title": "mine"}')
    result = run_job(job)
    assert result["status"] == "failed"
    assert "job.json was not written by a sweep" in result["error"]
    assert (job.folder / "job.json").read_text() == '{"title": "mine"}'


def test_the_holder_may_take_it_again_and_lets_go_in_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with locked(folder):
            pass
        assert (folder / ".lock.json").exists()
        with pytest.raises(FolderInUseError, match="in use by process"):
            in_thread(folder)
    assert not folder.parent.exists()  # nothing was written
    with locked(folder):
        (folder / "file").touch()
    in_thread(folder)
    assert {path.name for path in folder.iterdir()} == {"file", ".lock"}


def in_thread(folder: Path) -> None:
    """Take the lock in another thread; raises what is raised there."""
    errors: list[SphereError] = []

    def take() -> None:
        try:
            with locked(folder):
                time.sleep(0)
        except SphereError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(SECONDS)
    for error in errors:
        raise error


def test_an_unreadable_note_of_the_holder(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock.json").write_text("{")
        with pytest.raises(FolderInUseError, match="in use by another process: wait"):
            in_thread(tmp_path)
