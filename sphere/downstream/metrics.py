"""From decoded text to a prediction, and from predictions to accuracy, F1 and MCC.

Knows nothing of models, files or prompts. An output in which no prediction can be found counts as wrong, and is
counted as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import binomtest
from sklearn.metrics import f1_score, matthews_corrcoef

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
UNPARSED = "none"  # a class of its own for MCC


def first_line(text: str) -> str:
    """The first line that says something; what a model adds after its answer is not the answer."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def first_number(text: str) -> str | None:
    """The first number in canonical form ("1234.5"), or None."""
    match = NUMBER.search(text)
    if match is None:
        return None
    value = match[0].replace("$", "").replace(",", "")
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def first_word_among(text: str, words: Sequence[str]) -> str | None:
    """The first of `words` (lower case) that occurs as a whole word, or None."""
    match = re.search(rf"\b({'|'.join(map(re.escape, words))})\b", text.lower())
    return match[1] if match else None


def task_metrics(records: Sequence[dict[str, Any]], positive: str | None) -> dict[str, Any]:
    """Metrics over graded records.

    Args:
        records: each with `correct`, `prediction` (None where unparsed), `answers` and optionally `exact_match`, `f1`.
        positive: the positive class of a two-class task (then F1 and MCC are over classes), or None.

    Returns:
        n; accuracy with its Wilson 95 % interval; unparsed; where they make sense exact_match, f1, mcc. An output
        without prediction is not the positive class for F1 and a third class for MCC.
    """
    n = len(records)
    right = sum(bool(record["correct"]) for record in records)
    result: dict[str, Any] = {"n": n, "accuracy": right / n if n else None}
    if not n:
        return result
    interval = binomtest(right, n).proportion_ci(method="wilson")
    result["accuracy_interval"] = [float(interval.low), float(interval.high)]
    result["unparsed"] = sum(record["prediction"] is None for record in records)
    for name in ("exact_match", "f1"):
        if name in records[0]:
            result[name] = sum(float(record[name]) for record in records) / n
    if positive is not None:
        gold = [record["answers"][0] for record in records]
        found = [record["prediction"] or UNPARSED for record in records]
        result["f1"] = float(
            f1_score([g == positive for g in gold], [p == positive for p in found], zero_division=0)
        )
        result["mcc"] = float(matthews_corrcoef(gold, found))
    return result


def published_metrics(records: Sequence[dict[str, Any]], positive: str | None = None) -> dict[str, Any]:
    """Metrics over records that are graded in the published form.

    Args:
        records: as for `task_metrics`; of tasks with two classes also `choice`, the class of the likelier answer.
        positive: of no use here: F1 is the classes' mean, weighted by their numbers.

    Returns:
        n, accuracy, its interval and unparsed as `task_metrics` (outputs without prediction are wrong);
        accuracy_of_valid, the authors' `acc`, which leaves those out (None where there are only such); with two
        classes also f1 and mcc, and choice_accuracy and choice_f1 of the likelier answers.
    """
    result = task_metrics(records, None)
    if not records:
        return result
    valid = result["n"] - result["unparsed"]
    right = sum(bool(record["correct"]) for record in records)
    result["accuracy_of_valid"] = right / valid if valid else None
    if "choice" in records[0]:
        gold = [record["answers"][0] for record in records]
        found = [record["prediction"] or UNPARSED for record in records]
        likelier = [record["choice"] for record in records]
        result["f1"] = weighted_f1(list(zip(gold, found, strict=True)))
        result["mcc"] = float(matthews_corrcoef(gold, found))
        result["choice_accuracy"] = sum(g == c for g, c in zip(gold, likelier, strict=True)) / len(gold)
        result["choice_f1"] = weighted_f1(list(zip(gold, likelier, strict=True)))
    return result


def first_contained(output: str, words: Iterable[str]) -> str | None:
    """The first of these words that occurs in an output, in whatever case; None where none does."""
    said = output.lower()
    return next((word for word in words if word in said), None)


def weighted_f1(items: Sequence[tuple[Any, Any]]) -> float:
    """F1 of each class, averaged by how often it is right to name it; of (gold, predicted) pairs."""
    gold, found = zip(*items, strict=True)
    return float(f1_score(gold, found, average="weighted", zero_division=0))
