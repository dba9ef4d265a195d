"""How outputs of the GLUE and MMLU tasks of AlphaEdit's evaluation (arXiv 2410.02355) are graded.

`data/lm_eval_tasks/alphaedit_*.yaml` name these functions: lm-evaluation-harness calls them with a row of the data and
its output. A word counts where it occurs, in whatever case; the first of a task's words that occurs is the answer, and
an output with none of them is invalid. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sphere.downstream.metrics import first_contained

INVALID = -1  # a class of its own for F1
Row = Mapping[str, Any]


def sst2(row: Row, outputs: Sequence[str]) -> dict[str, Any]:
    """Sentiment: 1 is positive."""
    return _graded(outputs[0], {"positive": 1, "negative": 0}, row["label"])


def mrpc(row: Row, outputs: Sequence[str]) -> dict[str, Any]:
    """Paraphrases: 1 is yes."""
    return _graded(outputs[0], {"yes": 1, "no": 0}, row["label"])


def cola(row: Row, outputs: Sequence[str]) -> dict[str, Any]:
    """Acceptability: 1 is yes."""
    return _graded(outputs[0], {"yes": 1, "no": 0}, row["label"])


def rte(row: Row, outputs: Sequence[str]) -> dict[str, Any]:
    """Entailment in GLUE's labels: 0 is entailment, true."""
    return _graded(outputs[0], {"false": 1, "true": 0}, row["label"])


def nli(row: Row, outputs: Sequence[str]) -> dict[str, Any]:
    """Entailment in the words of `test-NLI.tsv`."""
    return _graded(outputs[0], {"true": 1, "false": 0}, int(row["label"] == "entailment"))


def mmlu(row: Row, outputs: Sequence[str]) -> dict[str, Any]:
    """The first of A to D that ends a line."""
    letters = {f"{letter}\n": number for number, letter in enumerate("abcd")}
    return _graded(outputs[0], letters, row["answer"])


def count(items: Sequence[float]) -> float:
    """How many of the outputs: an aggregation beside the harness's own."""
    return float(sum(items))


def _graded(output: str, words: Mapping[str, int], gold: int) -> dict[str, Any]:
    """What the metrics of a task are made of: `f1` is a pair for `sphere.downstream.metrics.weighted_f1`."""
    word = first_contained(output, words)
    found = INVALID if word is None else words[word]
    return {"acc": float(found == gold), "f1": (gold, found), "invalid": float(found == INVALID)}
