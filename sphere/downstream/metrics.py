"""From decoded text to a prediction, and from predictions to accuracy, F1 and MCC.

Knows nothing of models, files or prompts. An output in which no prediction can be found counts as wrong, and is
counted as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
