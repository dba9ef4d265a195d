"""The finished trials of a search as rows, a CSV file and a table for reading."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere.evaluation.summary import format_lines
from sphere.files import atomic_path
from sphere.tuning.objective import PARTS
from sphere.tuning.search import Search


def trial_rows(search: Search) -> list[dict[str, Any]]:
    """The finished trials as rows of a table."""
    rows = []
    for number, trial in enumerate(search.finished):
        outcome, numbers = trial.user_attrs["outcome"], trial.user_attrs["numbers"]
        state = "stopped" if search.is_pruned(trial) else "failed" if outcome["error"] else "finished"
        parts = outcome["parts"] or dict.fromkeys(PARTS)
        rest = {key: value for key, value in outcome.items() if key != "parts"}
        rows.append({"trial": number, "state": state, **rest, **parts, **numbers})
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a CSV file."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def format_trials(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """The trials as a table for reading, the best one not marked."""
    numbers = list(rows[0])[list(rows[0]).index(PARTS[-1]) + 1 :]
    lines = [["trial", "edits", *PARTS, "score", "perplexity", "objective", *numbers, "s"]]
    for row in rows:
        shown = [row[part] for part in PARTS] + [row["score"]]
        lines.append(
            [
                f"{row['trial']} {row['state']}",
                str(row["n_edits"]),
                *("-" if value is None else f"{value:.1f}" for value in shown),
                "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}",
                f"{row['value']:.1f}",
                *(f"{row[name]:.4g}" for name in numbers),
                f"{row['seconds']:.0f}",
            ]
        )
    return format_lines(lines, markdown)
