"""What a job of a sweep does: one run, edited and scored, unless it is finished.

    <sweep_dir>/seed_<seed>[_<key>_<value>...]/<the run's own folder>/     as `sphere edit` writes it
        job.json                                                        what became of the job
    <sweep_dir>/unedited/                                           the unedited model's cases, shared by the jobs

A job that is finished is not run again; one that was stopped goes on from its last finished batch or its last scored
records. So a sweep that was killed is started again with the same command.

Knows runs and their scores. Knows nothing of Hydra (`sphere.commands.sweep`), which says which jobs there are and
where each one runs; one table of them all is `sphere.runs.sweep_table`'s.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere.checkpoints import CONFIG_NAME
from sphere.data.records import load_records
from sphere.errors import SphereError
from sphere.evaluation.answer_metrics import AnswerOptions
from sphere.evaluation.evaluate_run import FOLDER, SUMMARY_NAME, evaluate_run
from sphere.files import write_json
from sphere.lock import FolderInUseError, locked
from sphere.runs.config import settings
from sphere.runs.folder import JOB_NAME
from sphere.runs.job import SCORING, Job, in_words, read_job
from sphere.runs.run import execute

log = logging.getLogger(__name__)

BEFORE = "before"  # key of job.json: the finished job whose place this one is about to take
UNEDITED = "unedited"
# What may change without a finished job being run again.
OF_THE_MACHINE = (
    "device",
    "device_map",
    "batch_tokens",
    "conserve_memory",
    "use_cache",
    "cache_dir",
    "stats_dir",
)
# What a run does after each batch or looks at there: a finished one does it no more.
OF_EACH_BATCH = (
    "checkpoints",
    "save",
    "ledger",
    "log_energy_every",
    "tensorboard",
    "on_breakdown",
    "guard",
    "guard_limits",
)


def run_job(job: Job) -> dict[str, Any]:
    """Run and score a job, unless it is finished; what became of it is kept in its folder.

    An error ends the job, not the sweep: it is logged, and stands in the table, unless a job of other settings is
    finished in this folder, which keeps its place there.

    Returns:
        The content of job.json: {"status": "finished", "failed" or "busy" (another process is at it), "error",
        "seconds" (of all its starts), "settings"}.
    """
    folder, path = job.folder, job.folder / JOB_NAME
    try:
        with locked(folder):
            if previous := finished_before(job):
                log.info("%s: finished before.", folder)
                return previous
            previous = read_job(path) if path.exists() else {}
            other = finished_other(job)
            _check_too_late(job, other)
            return _attempt(job, path, previous.get("seconds", 0.0), other)
    except SphereError as problem:  # the job could not begin; its folder is as it was
        log.error("%s: %s", folder, problem)
        status = "busy" if isinstance(problem, FolderInUseError) else "failed"
        return {"status": status, "error": str(problem), "seconds": 0.0, "settings": job.settings}


def _check_too_late(job: Job, other: Mapping[str, Any] | None) -> None:
    """Refuse a job that would take up a finished one's run and ask of its batches what these have not done.

    Raises:
        SphereError: such settings; it names them.
    """
    if not other:
        return
    known, wanted = _with_defaults(other["settings"]), job.settings
    if differing := [name for name in OF_EACH_BATCH if known[name] != wanted[name]]:
        raise SphereError(
            f"{job.folder} holds a finished run with {in_words(known, differing)}, which the job with "
            f"{in_words(wanted, differing)} cannot change any more: give it a sweep_dir of its own.",
            argument="sweep_dir",
        )


def _attempt(job: Job, path: Path, seconds: float, other: dict[str, Any] | None) -> dict[str, Any]:
    """Run and score a job.

    Args:
        seconds: what earlier starts took.
        other: what became of another job that is finished there; it is kept where this one fails.
    """
    note: dict[str, Any] = {"settings": job.settings, "seconds": seconds}
    write_json(path, {"status": "unfinished", "error": None, **note, **({BEFORE: other} if other else {})})
    start = time.perf_counter()
    status, error = "finished", None
    try:
        _run(job)
    except SphereError as problem:
        status, error = "failed", str(problem)
        log.error("%s: %s", job.folder, problem)
    except Exception as problem:  # a bug or a full GPU: the other jobs go on
        status, error = "failed", f"{type(problem).__name__}: {problem}"
        log.exception("%s failed", job.folder)
    note["seconds"] += time.perf_counter() - start
    result = {"status": status, "error": error, **note}
    write_json(path, other if other and status == "failed" else result)
    return result


def _run(job: Job) -> None:
    config = job.run_config
    begun = (job.folder / CONFIG_NAME).exists()
    run = execute(replace(config, continue_from_run=begun, overwrite=False))
    run.editor.revert()
    published = job.generation_interval and not config.facts
    evaluate_run(
        run.model,
        run.tokenizer,
        run.folder,
        run.records,
        generation_interval=job.generation_interval,
        exact_match_facts=job.exact_match_facts,
        answers=AnswerOptions(job.generated_facts),
        scored_facts=job.scored_facts,
        data_dir=config.data_dir,
        dataset=load_records(config.ds_name, config.data_dir) if published else None,
        notes=run.notes,
        passes=config.passes,
        seed=config.seed,
        unedited_dir=Path(config.output_dir) / UNEDITED,
    )


def finished_before(job: Job) -> dict[str, Any] | None:
    """What became of a job that was run to its end with settings that give the same numbers; None of another one."""
    path = job.folder / JOB_NAME
    previous = read_job(path) if path.exists() else {}
    finished = (
        previous.get("status") == "finished"
        and _is_of(previous, job)
        and (job.folder / FOLDER / SUMMARY_NAME).exists()
    )
    return previous if finished else None


def finished_other(job: Job) -> dict[str, Any] | None:
    """What became of a job with other settings that is finished in a job's folder; None where there is none."""
    path = job.folder / JOB_NAME
    previous = read_job(path) if path.exists() else {}
    found: dict[str, Any] | None = previous if previous.get("status") == "finished" else previous.get(BEFORE)
    return found if found and not _is_of(found, job) else None


def _is_of(previous: Mapping[str, Any], job: Job) -> bool:
    """Whether what job.json says is of a job with settings that give the same numbers."""

    def deciding(known: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in _with_defaults(known).items() if k not in OF_THE_MACHINE}

    return deciding(previous["settings"]) == deciding(json.loads(json.dumps(job.settings)))


def _with_defaults(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a job; one that its version did not know had what is its default now."""
    return {name: setting.default for name, setting in settings().items()} | SCORING | dict(known)
