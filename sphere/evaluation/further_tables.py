"""A table of generated answers and of a benchmark's further tests, below that of scores.

One line for each state and for what is asked: what the model says by itself stands beside the accuracy under teacher
forcing, which is not the same.

Knows what `sphere.evaluation.summary` returns. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sphere.evaluation.summary import METRICS, cell, format_lines, format_table

Row = Mapping[str, Any]
HEAD = ["weights", "edits", "asked", "cases"]
FORCED = "teacher-forced accuracy"
COLUMNS = {  # title -> metric
    FORCED: "{}_accuracy",
    "generated: exact match": "generated_exact_match_{}",
    "generated: contained": "generated_containment_{}",
    "generated: token F1": "generated_f1_{}",
    "generated: judged": "generated_judged_{}",
}
OWN = {"rewrite": "efficacy_accuracy"}  # teacher-forced accuracies with a name of their own


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
    columns = [title for title in COLUMNS if any(_key(title, name) in row["metrics"] for row, name in asked)]
    lines = [[*HEAD, *columns]]
    for row, name in asked:
        found = [row["metrics"].get(_key(title, name)) for title in columns]
        n = max(entry["n"] for entry in found if entry)
        lines.append([row["label"], str(row["n_edits"]), name, str(n), *map(cell, found)])
    return lines


def _key(title: str, name: str) -> str:
    return OWN.get(name, COLUMNS[title].format(name)) if title == FORCED else COLUMNS[title].format(name)


def _asked(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What is asked: prompts that have generated answers, then the other further tests."""
    first = COLUMNS["generated: exact match"].format("")
    suffix = COLUMNS[FORCED].format("")
    further = [key for key in metrics if _is_further(key, metrics)]
    names = [key.removeprefix(first) for key in further if key.startswith(first)]
    names += [key.removesuffix(suffix) for key in further if key.endswith(suffix)]
    yield from dict.fromkeys(names)


def _is_further(key: str, metrics: Mapping[str, Any]) -> bool:
    return (
        key not in METRICS[metrics["kind"]] and isinstance(metrics[key], Mapping) and "mean" in metrics[key]
    )
