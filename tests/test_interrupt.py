"""Ctrl-C, once and twice: one short line, exit status 130, no traceback."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_run import TinyRun, flags

ROOT = Path(__file__).parents[1]
SECONDS = 120

# Commands that take their time to end: within the command, or in what Python does after it.
COMMAND = """
import atexit, sys, time
from sphere.commands.common import run_cli

def slowly():
    print("ending", flush=True)
    time.sleep(60)

def main(argv):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        if sys.argv[1] == "within":
            slowly()

if sys.argv[1] == "after":
    atexit.register(slowly)
run_cli(main)
"""


def interrupted(command: list[str], signs: list[str]) -> tuple[int, list[str]]:
    """Exit status and stderr of a command that gets a SIGINT after each of these lines of its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits what is ignored
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    bound = threading.Timer(SECONDS, process.kill)
    bound.start()
    try:
        assert process.stdout
        for sign in signs:
            lines = itertools.takewhile(lambda line: line.strip() != sign, process.stdout)  # noqa: B023
            logged = "".join(lines)
            assert process.poll() is None, logged
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        bound.cancel()
        process.kill()
        process.wait(SECONDS)
    return process.returncode, [line for line in err.splitlines() if line.strip()]


def test_once() -> None:
    code, err = interrupted([sys.executable, "-c", COMMAND, "plainly"], ["working"])
    assert code == 130
    assert err == ["Interrupted."]


@pytest.mark.parametrize("where", ["within", "after"])
def test_twice(where: str) -> None:
    code, err = interrupted([sys.executable, "-c", COMMAND, where], ["working", "ending"])
    assert code == 130
    assert err[-1] == "Interrupted again: ended at once."
    assert set(err) <= {"Interrupted.", err[-1]}


# A sweep whose job, and then whose end, is slow.
SWEEP = """
import sys, time
import sphere.runs.sweep
from experiments import sweep
from sphere.commands.common import run_cli

def slow_run(*_):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(60)

sphere.runs.sweep.execute = slow_run
run_cli(sweep.main)
"""


@pytest.mark.parametrize("signs", [["working"], ["working", "ending"]])
def test_a_sweep(signs: list[str], tmp_path: Path, tiny_tokenizer) -> None:
    pytest.importorskip("hydra")
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=2)
    script = SWEEP if len(signs) == 2 else SWEEP.replace("time.sleep(60)\n\n", "pass\n\n")
    (tmp_path / "job.py").write_text(script)
    words = [flag.removeprefix("--") for flag in flags({**world.places, "sweep_dir": tmp_path / "sweep"})]
    words = [word for word in words if not word.startswith("cache_dir")]
    code, err = interrupted([sys.executable, str(tmp_path / "job.py"), *words, "alg_name=FT"], signs)
    assert code == 130
    assert "Traceback" not in "\n".join(err)
    assert err[-1] == ("Interrupted." if len(signs) == 1 else "Interrupted again: ended at once.")
