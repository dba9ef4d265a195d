"""A table of a benchmark's further tests, beside that of scores: one line for each state and test.

Knows what `sphere.evaluation.summary` returns. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sphere.evaluation.summary import METRICS, cell, format_lines, format_table

Row = Mapping[str, Any]
HEAD = ["weights", "edits", "asked", "cases"]
COLUMNS = {"teacher-forced accuracy": "{}_accuracy"}


def format_summary(summary: Mapping[str, Any]) -> str:
    """All tables of a summary for the terminal."""
    rows = summary["checkpoints"]
    tables = [format_table(rows)]
    lines = further_lines(rows)
    if len(lines) > 1:
        tables.append(format_lines(lines))
    return "\n\n".join(tables)


def further_lines(rows: Sequence[Row]) -> list[list[str]]:
    """The further tests of checkpoints as cells, the first line its head.

    Args:
        rows: {"label", "n_edits", "metrics"}, as in a summary.
    """
    asked = [(row, name) for row in rows for name in _asked(row["metrics"])]
    columns = {
        title: key
        for title, key in COLUMNS.items()
        if any(key.format(name) in row["metrics"] for row, name in asked)
    }
    lines = [[*HEAD, *columns]]
    for row, name in asked:
        found = [row["metrics"].get(key.format(name)) for key in columns.values()]
        n = max(entry["n"] for entry in found if entry)
        lines.append([row["label"], str(row["n_edits"]), name, str(n), *map(cell, found)])
    return lines


def _asked(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What is asked beside the kind's own metrics, in its order."""
    suffix = COLUMNS["teacher-forced accuracy"].format("")
    yield from (
        key.removesuffix(suffix) for key in metrics if _is_further(key, metrics) and key.endswith(suffix)
    )


def _is_further(key: str, metrics: Mapping[str, Any]) -> bool:
    return (
        key not in METRICS[metrics["kind"]] and isinstance(metrics[key], Mapping) and "mean" in metrics[key]
    )
