"""One table of all jobs of a sweep.

    <sweep_dir>/sweep.json, sweep.csv, sweep.md     one row per job, and means over seeds

Knows what jobs have written (`sphere.runs.sweep`). Loads no model.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere.checkpoints import LOG_NAME, list_checkpoints, read_weights
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import FOLDER, SUMMARY_NAME
from sphere.evaluation.summary import COLUMNS, format_lines, format_table
from sphere.files import atomic_path, read_json, write_json
from sphere.models import model_label
from sphere.runs.config import OWN_FACTS, PROGRAM, RunConfig, limit_by_default
from sphere.runs.folder import JOB_NAME
from sphere.runs.job import UNNAMED, read_job
from sphere.runs.resolve import has_sphere

TABLE_NAME = "sweep"
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


def _row(path: Path) -> dict[str, Any]:
    job = read_job(path)
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
    jobs = [read_job(Path(row["folder"]) / JOB_NAME)["settings"] for row in rows] if with_and_without else []
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
