"""Teacher-forced scores of a benchmark's further tests: the fraction of an answer's tokens that are the argmax.

A test is passed by one of its questions, or by all of them (`sphere.data.formats.Probe`): its value is the best or the
worst of theirs. A test with conditions counts only where the unedited model knows all that they ask (RippleEdits, Cohen
et al. 2024, arXiv 2307.12976, section 4.2, which asks for generated text).

Knows probes and dictionaries. Knows nothing of models.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sphere.data.formats import Question
from sphere.data.records import Record

Case = Mapping[str, Any]


def scored_questions(record: Record) -> Iterator[Question]:
    """All questions of a record's probes that have an answer to be scored, conditions among them."""
    for probe in record.probes:
        yield from (q for q in (*probe.questions, *probe.conditions) if q.answers)


def probe_entries(record: Record, accuracy: Callable[[Question], float]) -> list[dict[str, Any]]:
    """JSON-able, one per probe: metric, every, questions and conditions (prompt, target, accuracy), counts.

    Args:
        accuracy: the fraction of the tokens of a question's first answer that are the argmax.
    """

    def scored(questions: Iterable[Question]) -> list[dict[str, Any]]:
        return [
            {"prompt": q.prompt, "target": q.answers[0], "accuracy": accuracy(q)}
            for q in questions
            if q.answers
        ]

    return [
        {
            "metric": probe.metric,
            "every": probe.every,
            "questions": scored(probe.questions),
            "conditions": scored(probe.conditions),
            "counts": not probe.conditions,
        }
        for probe in record.probes
    ]


def compare_probes(case: Case, unedited: Case) -> None:
    """Let a test count where the unedited model fulfils its conditions."""
    for probe, before in zip(case.get("probes", ()), unedited.get("probes", ()), strict=True):
        probe["counts"] = all(condition["accuracy"] == 1 for condition in before["conditions"])


def probe_metrics(case: Case) -> Iterator[str]:
    """The names under which a case's probes are summarised."""
    return (f"{probe['metric']}_accuracy" for probe in case.get("probes", ()) if probe["questions"])


def probe_accuracy(name: str) -> Callable[[Case], float | None]:
    """A case's mean over the tests of one such name that count, in percent; None where there is none."""

    def metric(case: Case) -> float | None:
        values = [
            combined((question["accuracy"] for question in probe["questions"]), probe["every"])
            for probe in case.get("probes", ())
            if f"{probe['metric']}_accuracy" == name and probe["questions"] and probe["counts"]
        ]
        return 100.0 * statistics.fmean(values) if values else None

    return metric


def combined(values: Iterable[float], every: bool) -> float:
    """What the questions of one test come to."""
    return min(values) if every else max(values)
