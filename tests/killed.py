"""Runs that end without warning: in processes of their own that are killed, or broken off where they stand."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import sphere.runs.run
from sphere.runs.run import RunConfig, execute

# Children are forked from a process that has imported everything and computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["sphere.runs.run", "sphere.baselines.mend", "transformers.models.llama.modeling_llama", "pytest"]
)
SECONDS = 300


def start(config: RunConfig, fatal_step: int = 0) -> BaseProcess:
    """Begin a run, or go on with it where it has begun.

    Args:
        fatal_step: die just before the so-many-th call that moves bytes or names to the disk; 0 for never.
    """
    process = CONTEXT.Process(target=_run, args=(config, fatal_step), daemon=True)
    process.start()
    return process


def finish(config: RunConfig) -> None:
    """Run to the end."""
    process = start(config)
    process.join(SECONDS)
    assert process.exitcode == 0


def kill_after(process: BaseProcess, seconds: float) -> bool:
    """SIGKILL a process unless it has ended before; returns whether it was killed."""
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _run(config: RunConfig, fatal_step: int) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    torch.set_num_threads(1)
    if fatal_step:
        _die_at(fatal_step)
    execute(config)


def _die_at(fatal_step: int) -> None:
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal_step:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(SECONDS)
            return function(*args, **kwargs)

        return call

    os.replace, os.fsync, os.unlink = map(counted, (os.replace, os.fsync, os.unlink))


def continuing(config: RunConfig, begun: bool) -> RunConfig:
    """The same run, to go on with where it has begun."""
    return replace(config, continue_from_run=begun)


class Stopped(BaseException):
    """Ends a run where it stands."""


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, batch: int) -> Iterator[None]:
    """Break a run off when a batch (counted from 0) has been written into the model and is about to be logged."""
    original = sphere.runs.run.append_line

    def append_line(path: Path, line: str) -> None:
        if json.loads(line)["batch"] == batch:
            raise Stopped
        original(path, line)

    with monkeypatch.context() as patch:
        patch.setattr(sphere.runs.run, "append_line", append_line)
        with pytest.raises(Stopped):
            yield
