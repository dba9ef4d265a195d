"""The commands that make a run and its parts again, and sentences on the parts that are not there.

Knows `RunData` and the flags of the command lines.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sphere.downstream.published import PREFIX
from sphere.report.collect import RunData
from sphere.report.weight_figures import share_rows
from sphere.runs.config import OWN_FACTS, PROGRAM, RunConfig
from sphere.runs.remake import CONTINUED, commands_of

MODEL_FLAGS = ("model_name", "device", "dtype", "device_map")
DEFAULTS = RunConfig()


def edit_commands(run: RunData) -> list[str]:
    """The commands that edit again, in their order; none where the run's settings are not known."""
    return commands_of(run.config, run.folder) if run.described else []


def score_command(run: RunData, only: str | None = None) -> str:
    """The command that scores the edits (again, with the settings it was scored with).

    Args:
        only: the checkpoints that it scores, as `--only_checkpoints` names them; None: all.
    """
    config, summary = run.config, run.summary or {}
    own, scored = config.get("ds_name"), summary.get("dataset")
    # A run that was scored and then got a table of facts has another dataset since; such facts have no limit.
    ds_name = (own or scored if run.described else scored or own) or "DATASET"
    limit = config.get("dataset_size_limit") or len(config.get("case_ids", ())) or None
    flags = {
        "ds_name": ds_name,
        "data_dir": config.get("data_dir"),
        "dataset_size_limit": None if ds_name == OWN_FACTS else limit,
        "generation_test_interval": summary.get("generation_interval") or None,
        "exact_match_facts": summary.get("exact_match_facts") or None,
        "generated_facts": summary.get("generated_facts") or None,
        "scored_facts": summary.get("scored_facts") or None,
        "judge": summary.get("judge"),
        "seed": summary.get("seed") or None,
        "only_checkpoints": only,
    }
    return _evaluate(run, flags)


def downstream_command(run: RunData, only: str | None = None) -> str:
    """The command that runs the downstream tasks (again); `only` as for `score_command`."""
    downstream = run.downstream or {}
    names = [name for entry in downstream.get("checkpoints", {}).values() for name in entry.get("tasks", {})]
    published = bool(names) and all(name.startswith(PREFIX) for name in names)
    flags = {
        "data_dir": run.config.get("data_dir"),
        "num_tests": downstream.get("num_tests"),
        "task_format": "published" if published else None,
        "only_checkpoints": only,
    }
    return _evaluate(run, flags)


def _evaluate(run: RunData, flags: dict[str, object]) -> str:
    model = {name: run.config.get(name) for name in MODEL_FLAGS}
    defaults = {"data_dir": DEFAULTS.data_dir, **{name: getattr(DEFAULTS, name) for name in MODEL_FLAGS}}
    words = [*PROGRAM, "score", f"--weight_folder={run.folder}"]
    for name, value in (flags | model).items():
        if value is not None and value != defaults.get(name):
            words.append(f"--{name}={value}")
    return shlex.join(words)


def missing(runs: Sequence[RunData]) -> list[tuple[str, str | None]]:
    """(sentence, command or None) for every part that a report could show of a run but that is not there."""
    notes: list[tuple[str, str | None]] = []
    for run in runs:
        if run.summary is None:
            notes.append(
                (f"{run.label}: the edits are not scored yet. This command scores them:", score_command(run))
            )
        elif run.scored_edits < run.n_edits:
            text = (
                f"{run.label}: its scores end at {run.scored_edits} of {run.n_edits} edits. This command scores the "
                "last checkpoint, too:"
            )
            notes.append((text, score_command(run, _with_the_last(run))))
        if run.downstream is None:
            text = f"{run.label}: the downstream tasks have not been run. This command runs them:"
            notes.append((text, downstream_command(run)))
        elif run.checkpoints and (done := _downstream_edits(run)) < (last := run.checkpoints[-1].n_edits):
            text = (
                f"{run.label}: its downstream results end at {done} of {last} edits. This command runs the tasks on "
                "the last checkpoint, too:"
            )
            notes.append((text, downstream_command(run, "last")))
        if not run.batches:
            notes.append((f"{run.label}: {_without_log(run)}", None))
        elif not share_rows(run):
            notes.append(
                (
                    f"{run.label}: the principal shares of its updates were not logged. {_AGAIN}",
                    _log_command(run),
                )
            )
        if not run.checkpoints:
            text = "its checkpoints have been removed; all but the neurons' cosines is from its scores and its log."
            notes.append((f"{run.label}: {text}", None))
        elif not run.has_original:
            text = "there is no edit_0, so that energies and cosines of the unedited weights are unknown."
            notes.append((f"{run.label}: {text}", None))
        if not run.described:
            text = (
                "there is no run.json: method and settings are read from the folder's name, and weights are taken to "
                "be stored as (out x in)."
            )
            notes.append((f"{run.label}: {text}", None))
    return notes


_AGAIN = "This command edits again and logs them:"


def _log_command(run: RunData) -> str | None:
    """What edits again with the log, in one line."""
    if not run.described:
        return None
    every = DEFAULTS.log_energy_every
    commands = commands_of({**run.config, "log_energy_every": every}, run.folder)
    # Commands that were kept have the flag as it was given; the last of its values counts.
    if CONTINUED in run.config:
        commands = [f"{command} --log_energy_every={every}" for command in commands]
    return " && ".join(commands)


def _with_the_last(run: RunData) -> str:
    """The checkpoints that are scored, and the last one, as `--only_checkpoints` names them."""
    there = {checkpoint.n_edits for checkpoint in run.checkpoints}
    return ",".join([*(str(row["n_edits"]) for row in run.scored if row["n_edits"] in there), "last"])


def _downstream_edits(run: RunData) -> int:
    """Edits of the last checkpoint that the downstream tasks were run on; 0: none."""
    entries = run.downstream["checkpoints"].values() if run.downstream else ()
    return max((int(entry.get("n_edits", 0)) for entry in entries), default=0)


def _without_log(run: RunData) -> str:
    return (
        "there is no editing log (batches.jsonl), which alone knows the principal shares of the updates; energies are "
        "those of the checkpoints. Runs of `sphere edit` write it."
    )
