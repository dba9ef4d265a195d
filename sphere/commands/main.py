"""`sphere`: one command with a subcommand for each thing that can be done.

    sphere check      show how a table of facts will be read, and what is wrong with it
    sphere edit       edit a model in batches, and score what the edits did
    sphere score      score the checkpoints of a run, or run the downstream tasks on them
    sphere export     write the edited model of a run in a form that other programs load
    sphere report     compare runs in figures and one HTML page
    sphere ask        what the unedited and the edited model say to a prompt, side by side
    sphere compare    the same of several runs
    sphere log        every edit of a run: fact, batch, time, loss
    sphere undo       take edits out of a run's weights again, and measure what that does
    sphere redo       put them back
    sphere sweep      run and score many configurations, into one table
    sphere tune       find layers and hyperparameters for a model
    sphere plan       what a run will take in memory and time, loading no weights
    sphere methods    every method with its reference and defaults
    sphere hparams    the hyperparameters for a model; a file of them for a model that has none

`sphere <command> --help` says more. `python -m sphere` is the same.
"""

from __future__ import annotations

import importlib
import sys

from sphere.commands.common import Parser, run_cli

COMMANDS = (
    "check",
    "edit",
    "score",
    "export",
    "report",
    "ask",
    "compare",
    "log",
    "undo",
    "redo",
    "sweep",
    "tune",
    "plan",
    "methods",
    "hparams",
)


def main(argv: list[str] | None = None) -> int:
    """Hand the rest of the words to the subcommand that the first one names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    if name not in COMMANDS:
        Parser(prog="sphere").error(f"no command '{name}': use one of {', '.join(COMMANDS)}")
    code: int = importlib.import_module(f"sphere.commands.{name}").main(rest)
    return code


def run() -> None:
    """What the installed command `sphere` calls."""
    run_cli(main, spelled="{}=" if sys.argv[1:2] == ["sweep"] else "--{}")
