"""The table that the downstream tasks end with.

Knows the summary that `sphere.downstream.runner` returns. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphere.evaluation.summary import format_lines

# What lm-evaluation-harness calls accuracy, F1 and an output without an answer.
HARNESS = {"accuracy": ("acc", "exact_match"), "f1": ("f1",), "unparsed": ("invalid",)}


def format_downstream(summary: Mapping[str, Any]) -> str:
    """One line for each task and checkpoint, task by task, for the terminal."""
    return format_lines(downstream_lines(summary))


def downstream_lines(summary: Mapping[str, Any]) -> list[list[str]]:
    """The same as cells, the first line its head.

    A task of lm-evaluation-harness whose answers are read by several filters has a line for each of them.
    Columns of the published form (accuracy without invalid outputs, the likelier answer) are there where a task has it.
    """
    entries = sorted(summary["checkpoints"].values(), key=lambda entry: entry["n_edits"])
    found = [
        (title, entry["n_edits"], own)
        for key in ("tasks", "lm_eval")
        for name in dict.fromkeys(name for entry in entries for name in entry.get(key, {}))
        for entry in entries
        if (scores := entry.get(key, {}).get(name))
        for title, own in _by_filter(name, scores)
    ]
    further = {
        title: key
        for title, key in {
            "of valid": "accuracy_of_valid",
            "likelier": "choice_accuracy",
            "likelier F1": "choice_f1",
        }.items()
        if any(key in scores for _, _, scores in found)
    }
    lines = [["task", "weights", "n", "accuracy (%)", "F1 (%)", "invalid", *further]]
    for name, n_edits, scores in found:
        accuracy = _cell(_of(scores, "accuracy"))
        if interval := scores.get("accuracy_interval"):
            low, high = (100 * end for end in interval)
            accuracy += f" [{low:.1f}, {high:.1f}]"
        invalid = _of(scores, "unparsed")
        own = [
            name,
            f"edit_{n_edits}" if n_edits else "unedited",
            str(scores.get("n", "-")),
            accuracy,
            _cell(_of(scores, "f1")),
            "-" if invalid is None else f"{invalid:.0f}",
        ]
        lines.append([*own, *(_cell(scores.get(key)) for key in further.values())])
    return lines


def _by_filter(name: str, scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, scores) of each filter, whose keys are "metric,filter"; of most tasks the scores as they are."""
    of_filter: dict[str, dict[str, Any]] = {}
    for key, value in scores.items():
        metric, comma, one = key.partition(",")
        if comma:
            of_filter.setdefault(one, {})[metric] = value
    common = {key: value for key, value in scores.items() if "," not in key}
    return [(f"{name} ({one})", common | own) for one, own in of_filter.items()] or [(name, scores)]


def _of(scores: Mapping[str, Any], name: str) -> float | None:
    """A number by our name for it, or by the harness's."""
    return next((scores[key] for key in (name, *HARNESS[name]) if scores.get(key) is not None), None)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
