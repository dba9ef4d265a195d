"""Many runs: what a job of a sweep does, and one table of all of them.

    <sweep_dir>/seed_<seed>[_<key>_<value>...]/<the run's own folder>/     as `sphere edit` writes it
        job.json                                                        what became of the job
    <sweep_dir>/unedited/                                           the unedited model's cases, shared by the jobs
    <sweep_dir>/sweep.json, sweep.csv, sweep.md                         one row per job, and means over seeds

A job that is finished is not run again; one that was stopped goes on from its last finished batch or its last scored
records. So a sweep that was killed is started again with the same command.

Knows runs and their scores. Knows nothing of Hydra (`sphere.commands.sweep`), which says which jobs there are and
where each one runs.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere.checkpoints import CONFIG_NAME, LOG_NAME, list_checkpoints, read_weights
from sphere.data.records import load_records
from sphere.errors import SphereError
from sphere.evaluation.answer_metrics import AnswerOptions
from sphere.evaluation.evaluate_run import FOLDER, SUMMARY_NAME, evaluate_run
from sphere.evaluation.summary import COLUMNS, format_lines, format_table
from sphere.files import atomic_path, read_json, write_json
from sphere.lock import FolderInUseError, locked
from sphere.models import model_label
from sphere.renamed import by_new_names
from sphere.runs.config import OWN_FACTS, PROGRAM, RunConfig, limit_by_default, settings
from sphere.runs.folder import JOB_NAME
from sphere.runs.job import SCORING, UNNAMED, Job
from sphere.runs.resolve import has_sphere
from sphere.runs.run import execute

log = logging.getLogger(__name__)

TABLE_NAME = "sweep"
BEFORE = "before"  # key of job.json: the finished job whose place this one is about to take
UNEDITED = "unedited"
NOT_GIVEN = "not given"  # in place of a limit that labels leave out
# What a run's own folder says where it is not the default.
NAMED_IF_CHANGED = (
    "rules",
    "directions",
    "project",
    "alpha_budget",
    "revive_tau",
    "shuffle",
    "chat_template",
)
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
# What a row says of a finished job.
MEASURED = (
    "n_edits",
    "metrics",
    "unedited",
    "text_perplexity",
    "weights",
    "change_norm",
    "seconds_per_edit",
)
# What a row says of its run, beside that.
SETTINGS = ("alg_name", "model_name", "ds_name", "num_edits", "beta_hse", "alpha", "seed")


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
            previous = _read_job(path) if path.exists() else {}
            return _attempt(job, path, previous.get("seconds", 0.0), finished_other(job))
    except SphereError as problem:  # the job could not begin; its folder is as it was
        log.error("%s: %s", folder, problem)
        status = "busy" if isinstance(problem, FolderInUseError) else "failed"
        return {"status": status, "error": str(problem), "seconds": 0.0, "settings": job.settings}


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
    previous = _read_job(path) if path.exists() else {}
    finished = (
        previous.get("status") == "finished"
        and _is_of(previous, job)
        and (job.folder / FOLDER / SUMMARY_NAME).exists()
    )
    return previous if finished else None


def finished_other(job: Job) -> dict[str, Any] | None:
    """What became of a job with other settings that is finished in a job's folder; None where there is none."""
    path = job.folder / JOB_NAME
    previous = _read_job(path) if path.exists() else {}
    found: dict[str, Any] | None = previous if previous.get("status") == "finished" else previous.get(BEFORE)
    return found if found and not _is_of(found, job) else None


def _is_of(previous: Mapping[str, Any], job: Job) -> bool:
    """Whether what job.json says is of a job with settings that give the same numbers.

    A setting that its version did not know had what is its default now.
    """
    defaults = {name: setting.default for name, setting in settings().items()} | SCORING

    def deciding(known: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in {**defaults, **known}.items() if k not in OF_THE_MACHINE}

    return deciding(previous["settings"]) == deciding(json.loads(json.dumps(job.settings)))


def collect(sweep_dir: str | Path) -> list[dict[str, Any]]:
    """One row per job of a sweep, in the order of their settings; also written as sweep.json, sweep.csv and sweep.md.

    Returns:
        Rows {"label", "folder", "status", "error", "seconds", the SETTINGS, and what is MEASURED}. The latter is None
        where the job is not finished: the scores of its last checkpoint and of the unedited model on the same cases
        (`sphere.evaluation.summary.summarise`), perplexity and weight changes (`sphere.evaluation.state_metrics`), the
        Frobenius norm of the change of all edited weights together, and the editing time.

    Raises:
        SphereError: no job in that folder.
    """
    sweep_dir = Path(sweep_dir)
    rows = [_row(path) for path in sorted(sweep_dir.rglob(JOB_NAME))]
    if not rows:
        raise SphereError(f"No job has begun in {sweep_dir}: give sweep_dir the folder of a sweep.")
    rows.sort(key=lambda row: [(str(type(row[k])), row[k]) for k in SETTINGS])
    _label(rows)
    write_json(sweep_dir / f"{TABLE_NAME}.json", rows)
    _write_csv(sweep_dir / f"{TABLE_NAME}.csv", rows)
    with atomic_path(sweep_dir / f"{TABLE_NAME}.md") as temporary:
        temporary.write_text(format_sweep(rows, markdown=True) + "\n", "utf-8")
    return rows


def _read_job(path: Path) -> dict[str, Any]:
    """What became of a job, its settings by the names that they have now."""
    job: dict[str, Any] = read_json(path, "job")
    if not {"status", "settings"} <= job.keys():
        raise SphereError(
            f"{path} was not written by a sweep: move it, or choose another folder.", argument="sweep_dir"
        )
    return job | {"settings": by_new_names(job["settings"])}


def _row(path: Path) -> dict[str, Any]:
    job = _read_job(path)
    settings = job["settings"]
    row = {
        "folder": str(path.parent),
        **{k: job[k] for k in ("status", "error", "seconds")},
        **{k: settings[k] for k in SETTINGS},
        **{k: settings[k] for k in UNNAMED},
        **{k: settings.get(k, getattr(RunConfig, k)) for k in NAMED_IF_CHANGED},
        **dict.fromkeys(MEASURED),
    }
    summary = path.parent / FOLDER / SUMMARY_NAME
    if job["status"] == "finished" and summary.exists():
        last = read_json(summary, "summary")["checkpoints"][-1]
        row |= {
            key: last.get(key) for key in ("n_edits", "metrics", "unedited", "text_perplexity", "weights")
        }
        row["change_norm"] = change_norm(path.parent)
        batches = (path.parent / LOG_NAME).read_text("utf-8").splitlines()
        row["seconds_per_edit"] = sum(json.loads(line)["seconds"] for line in batches) / last["n_edits"]
    return row


def change_norm(folder: Path) -> float:
    """Frobenius norm of the change of all edited weights together, from the first to the last checkpoint of a run."""
    checkpoints = list_checkpoints(folder)
    before, after = read_weights(checkpoints[0].path), read_weights(checkpoints[-1].path)
    return math.sqrt(sum(float((after[n].double() - w.double()).square().sum()) for n, w in before.items()))


def _label(rows: Sequence[dict[str, Any]]) -> None:
    """Name each row by the settings in which the jobs differ, and always by its method."""

    def word(key: str, value: Any) -> str:
        if value == NOT_GIVEN:
            return ""
        if key == "model_name":
            return model_label(value)
        return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"

    keys = (*SETTINGS, *UNNAMED, *NAMED_IF_CHANGED)
    differing = [key for key in keys if len({str(_told(row, key)) for row in rows}) > 1 and key != "alg_name"]
    with_and_without = len({row["beta_hse"] for row in rows}) == 2 and any(
        not row["beta_hse"] for row in rows
    )
    # A job's settings have the hyperparameters, and so the rules that these name.
    jobs = [_read_job(Path(row["folder"]) / JOB_NAME)["settings"] for row in rows] if with_and_without else []
    hooks = ["+ SPHERE" if has_sphere(settings) else "" for settings in jobs] or [""] * len(rows)

    def labels(keys: Sequence[str]) -> list[str]:
        named = zip(rows, hooks, strict=True)
        parts = [
            [row["alg_name"], hook, *(word(key, _told(row, key)) for key in keys)] for row, hook in named
        ]
        return [" ".join(filter(None, words)) for words in parts]

    found = labels([key for key in differing if key != "beta_hse" or not with_and_without])
    if len(set(found)) < len(rows):  # rules without the hook, whatever its beta_hse
        found = labels(differing)
    for row, label in zip(rows, found, strict=True):
        row["label"] = label


def _told(row: Mapping[str, Any], key: str) -> Any:
    """A row's setting as labels have it: NOT_GIVEN for the limit that holds where none is given."""
    default = limit_by_default(OWN_FACTS if row["ds_name"] == OWN_FACTS else None)
    return NOT_GIVEN if key == "dataset_size_limit" and row[key] == default else row[key]


def format_sweep(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """The table of a sweep: finished jobs by kind of dataset, means over seeds, then what is not finished."""
    parts = []
    finished = [row for row in rows if row["metrics"]]
    for kind in sorted({row["metrics"]["kind"] for row in finished}):
        same = [row for row in finished if row["metrics"]["kind"] == kind]
        parts.append(format_table([*_unedited(same), *map(_shown, same)], markdown))
        if means := over_seeds(same):
            parts.append("Mean over seeds, ± standard deviation:\n\n" + _format_means(means, kind, markdown))
    open_ = [row for row in rows if not row["metrics"]]
    bullet = "- " if markdown else ""
    parts += [
        "\n".join(f"{bullet}{row['label']}: {row['status']}. {row['error'] or ''}".rstrip() for row in open_)
    ]
    return "\n\n".join(part for part in parts if part)


def _unedited(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each unedited model and set of cases among the jobs."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(_told(row, k) for k in ("model_name", "ds_name", "dtype", "dataset_size_limit"))
        found.setdefault(key, {"n_edits": 0, "metrics": row["unedited"], "name": [str(k) for k in key]})
    for row in found.values():
        differing = [
            n
            for n, *others in zip(row["name"], *(r["name"] for r in found.values()), strict=True)
            if len(set(others)) > 1 and n != NOT_GIVEN
        ]
        row["label"] = " ".join(["unedited", *differing])
    return list(found.values())


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: scores, what became of the model, and speed."""
    return {**row, "extra": {"s/edit": f"{row['seconds_per_edit']:.2f}"}}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of jobs that differ in nothing else; none where no job has two.

    Returns:
        {"label", "n" (seeds), "metrics": {name: (mean, sample standard deviation)}} for each group of two or more.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(str(row.get(k)) for k in (*SETTINGS, *UNNAMED, *NAMED_IF_CHANGED) if k != "seed")
        groups.setdefault(key, []).append(row)
    means = []
    for group in groups.values():
        if len(group) < 2:
            continue
        names = [n for n, entry in group[0]["metrics"].items() if isinstance(entry, Mapping)]
        values = {n: [_value(row["metrics"].get(n)) for row in group] for n in names}
        label = " ".join(w for w in group[0]["label"].split(" ") if not w.startswith("seed="))
        metrics = {n: (statistics.fmean(v), statistics.stdev(v)) for n, v in values.items() if None not in v}
        means.append({"label": label, "n": len(group), "metrics": metrics})
    return means


def _value(entry: Mapping[str, Any] | None) -> Any:
    return None if not entry else entry.get("value", entry.get("mean"))


def _format_means(means: Sequence[Mapping[str, Any]], kind: str, markdown: bool) -> str:
    columns = {t: n for t, n in COLUMNS[kind].items() if any(n in m["metrics"] for m in means)}
    lines = [["jobs", "seeds", *columns]]
    for mean in means:
        cells = [mean["metrics"].get(name) for name in columns.values()]
        lines.append(
            [
                mean["label"],
                str(mean["n"]),
                *("-" if c is None else f"{c[0]:.1f} ± {c[1]:.1f}" for c in cells),
            ]
        )
    return format_lines(lines, markdown)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Flat: one column per metric, with its interval."""
    flat = []
    for row in rows:
        line = {k: v for k, v in row.items() if k not in ("metrics", "unedited", "weights")}
        weights = row["weights"] or {}
        line |= {k: weights[k] for k in ("energy_change", "rotation") if k in weights}
        for name, entry in (row["metrics"] or {}).items():
            if isinstance(entry, Mapping):
                line |= {name: _value(entry), f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
        flat.append(line)
    names = list(dict.fromkeys(name for line in flat for name in line))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def report_command(rows: Sequence[Mapping[str, Any]], out: Path, reference: str | None = None) -> str:
    """The command that makes one report of all finished runs."""
    folders = [row["folder"] for row in rows if row["metrics"]]
    flags = ["--reference", reference] if reference else []
    return shlex.join([*PROGRAM, "report", "--weight_folder", *folders, *flags, "--out", str(out)])
