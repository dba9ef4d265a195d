"""The commands that make a run again: the one that began it, and those that went on with it, in their order.

Knows `run.json` and the flags of `sphere edit`. Reads and writes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphere.runs.batches import parts_of
from sphere.runs.config import PROGRAM, RunConfig, command_of

CONTINUED = "continued"  # key of run.json: the tables that were added, when, and by which command


def commands_of(stored: Mapping[str, Any], folder: str | Path) -> list[str]:
    """The commands that make a run again, one after the other.

    The settings of a run that was continued with further facts name the last of its tables only; what began it is then
    the command that its `run.json` has kept.

    Args:
        stored: its `run.json`.
        folder: where it is; continuations that an earlier version did not write down are of this folder.
    """
    later = stored.get(CONTINUED, ())
    if not later:
        return [command_of(stored)]
    added = [one.get("command") or continuation(folder, {"facts": one["facts"]}) for one in later]
    return [begun_by(stored), *added]


def begun_by(stored: Mapping[str, Any]) -> str:
    """The command that began a run, as its `run.json` has kept it.

    No flag says "all of a dataset": where a command of `sphere edit` leaves the limit out and the run has none, the
    number of the facts that it began with is its limit.
    """
    command = str(stored["command"])
    limited = stored.get("dataset_size_limit", RunConfig.dataset_size_limit) is not None
    if limited or not command.startswith(shlex.join([*PROGRAM, "edit"])):
        return command
    flags = {word.partition("=")[0] for word in shlex.split(command)}
    if flags & {"--facts", "--dataset_size_limit"}:
        return command
    n_begun = (*parts_of(stored), len(stored["case_ids"]))[1]
    return f"{command} --dataset_size_limit={n_begun}"


def continuation(folder: str | Path, given: Mapping[str, Any]) -> str:
    """The command that goes on with the run in `folder`.

    Args:
        given: settings that are given with it, by name; those that are None are not.
    """
    words = [*PROGRAM, "edit", f"--continue={folder}"]
    for name, value in given.items():
        if value is not None:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return shlex.join(words)
