"""Which answers are asked for, what they are measured by, and the means over a case.

Knows texts and dictionaries; `sphere.evaluation.generated_answers` makes them. Knows nothing of models.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphere.evaluation.answer_match import exact_match, soft_exact_match, token_f1
from sphere.evaluation.probes import combined
from sphere.values.joiner import spaced

KEY = "answers"  # of a case, under which they stand
MEASURES = ("exact_match", "containment", "f1", "judged")

Case = Mapping[str, Any]


@dataclass(frozen=True)
class AnswerOptions:
    """How many facts are asked, and who judges.

    Attributes:
        facts: from the first that was edited; 0: none.
        judge: the command of a program that judges the answers too (`sphere.evaluation.judge`).
        judge_seconds: how long it may take for one answer.
    """

    facts: int = 0
    judge: str | None = None
    judge_seconds: float = 120.0


def measured(text: str, targets: Sequence[str]) -> dict[str, Any]:
    """exact_match, containment and f1 of a text; writing without blanks is compared by characters."""
    text, targets = spaced(text), [spaced(target) for target in targets]
    return {
        "exact_match": exact_match(text, targets),
        "containment": soft_exact_match(text, targets),
        "f1": token_f1(text, targets),
    }


def compare_answers(case: Case, unedited: Case) -> None:
    """Measure what has no answer against what the unedited model says."""
    if KEY not in case or KEY not in unedited:
        return
    for entry, before in zip(case[KEY]["entries"], unedited[KEY]["entries"], strict=True):
        if not entry["targets"]:
            entry |= measured(entry["text"], [before["text"]])


def answer_metrics(case: Case) -> Iterator[str]:
    """The names under which a case's answers are summarised: generated_<measure>_<part>."""
    for entry in case.get(KEY, {}).get("entries", ()):
        yield from (f"generated_{measure}_{entry['part']}" for measure in MEASURES if measure in entry)


def answer_metric(name: str) -> Callable[[Case], float | None]:
    """A case's mean over its prompts, or its tests that count, under one such name, in percent."""

    def metric(case: Case) -> float | None:
        by_test: dict[int, list[float]] = {}
        for place, entry in enumerate(case.get(KEY, {}).get("entries", ())):
            measure = next((m for m in MEASURES if name == f"generated_{m}_{entry['part']}"), None)
            if measure in entry and _counts(case, entry):
                test = -1 - place if entry["probe"] is None else entry["probe"]
                by_test.setdefault(test, []).append(float(entry[measure]))
        values = [
            combined(values, test >= 0 and case["probes"][test]["every"]) for test, values in by_test.items()
        ]
        return 100.0 * statistics.fmean(values) if values else None

    return metric


def _counts(case: Case, entry: Mapping[str, Any]) -> bool:
    return entry["probe"] is None or case["probes"][entry["probe"]]["counts"]
