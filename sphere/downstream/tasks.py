"""The four downstream tasks of SPHERE's evaluation (arXiv 2510.01172, section 5, after Gu et al. 2024, RECT).

A task is data: a file under `task-data`, a prompt, how many tokens may answer it, and how an output is graded. Knows
nothing of models. `data/lm_eval_tasks` says the same in lm-evaluation-harness's words; a test holds them together.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere.downstream import metrics
from sphere.errors import SphereError
from sphere.evaluation.answer_match import exact_match, soft_exact_match, token_f1
from sphere.requests import check_encodable

FOLDER = "task-data"


@dataclass(frozen=True)
class Example:
    """One question: its place in the file, the prompt, and the accepted answers (one class name or several texts)."""

    index: int
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        name: also its result file's name.
        file: under `<data_dir>/task-data`.
        read: a row of the file -> (prompt, answers); raises KeyError, TypeError, ValueError or IndexError for a row
            that lacks something.
        grade: (output, answers) -> {"prediction", "correct", further figures}.
        max_new_tokens: of the answer.
        positive: the positive class for F1, where there are two classes.
        choices: (class, the word whose likelihood after the prompt speaks for it); () where outputs alone count.
        summarise: graded records, positive -> the task's metrics.
    """

    name: str
    file: str
    read: Callable[[Mapping[str, Any]], tuple[str, tuple[str, ...]]]
    grade: Callable[[str, tuple[str, ...]], dict[str, Any]]
    max_new_tokens: int
    positive: str | None = None
    choices: tuple[tuple[str, str], ...] = ()
    summarise: Callable[[Sequence[dict[str, Any]], str | None], dict[str, Any]] = metrics.task_metrics

    def scores(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Metrics over graded records; see `sphere.downstream.metrics`."""
        return self.summarise(records, self.positive)

    def examples(self, data_dir: str | Path, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of the task's file.

        Raises:
            SphereError: the file is missing, unreadable or empty, or a row lacks a field.
        """
        path = Path(data_dir) / FOLDER / self.file
        examples = []
        for index, row in enumerate(_rows(path)):
            if limit is not None and index >= limit:
                break
            try:
                prompt, answers = self.read(row)
                if not answers:
                    raise ValueError("no answer")
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise SphereError(
                    f"Row {index + 1} of {path} is no {self.name} example ({error!r}): correct or remove the row."
                ) from error
            for text in (prompt, *answers):
                check_encodable(text, f"Row {index + 1} of {path}")
            examples.append(Example(index, prompt, answers))
        if not examples:
            raise SphereError(f"{path} holds no examples: put the published file there.")
        return examples


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a .jsonl or .tsv file as dictionaries."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise SphereError(
            f"No task data at {path}: put the published file {path.name} there (RECT's data, folder task-data) or "
            "give the folder that holds task-data.",
            argument="data_dir",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SphereError(f"Cannot read the task data {path}: {error}.") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".tsv":
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SphereError(f"Row {number} of {path} is not valid JSON ({error.msg}).") from error
    return rows


def _one_line(text: str) -> str:
    """Runs of white space as one space."""
    return " ".join(text.split())


def read_reasoning(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """GSM8K: the worked solution, without calculator marks, is the hint; its last line `#### n` is the answer."""
    solution, _, final = row["answer"].partition("####")
    answer = metrics.first_number(final)
    hint = re.sub(r"<<.*?>>", "", solution)
    prompt = f"Q: {row['question'].strip()}\nA: {_one_line(hint)} Therefore, the answer (arabic numerals) is"
    return prompt, (answer,) if answer is not None else ()


def grade_reasoning(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """The first number must be the answer's."""
    prediction = metrics.first_number(output)
    return {"prediction": prediction, "correct": prediction == answers[0]}


def read_nli(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """RTE: does the first sentence entail the second?"""
    classes = {"entailment": "true", "not_entailment": "false"}
    prompt = (
        "Read the text and say whether the statement follows from it, with True or False.\n"
        f"Text: {row['sentence1'].strip()}\nStatement: {row['sentence2'].strip()}\nTrue or False? The answer is"
    )
    return prompt, (classes[row["label"].strip()],)


def grade_nli(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """The first "true" or "false" counts."""
    prediction = metrics.first_word_among(output, ("true", "false"))
    return {"prediction": prediction, "correct": prediction == answers[0]}


def read_open_domain_qa(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Natural Questions with a passage that a model has written for the question."""
    prompt = (
        "Refer to the passage below and answer the question.\n"
        f"Passage: {_one_line(row['output'][0])}\nQuestion: {row['question'].strip()}\nAnswer:"
    )
    return prompt, tuple(str(answer) for answer in row["answer"])


def grade_open_domain_qa(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """Soft exact match on the first line; strict exact match and word F1 beside it."""
    prediction = metrics.first_line(output)
    return {
        "prediction": prediction or None,
        "correct": soft_exact_match(prediction, answers),
        "exact_match": exact_match(prediction, answers),
        "f1": token_f1(prediction, answers),
    }


def read_closed_domain_qa(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """BoolQ with its passage."""
    prompt = (
        "Answer the question based on the passage, with yes or no.\n"
        f"Passage: {_one_line(row['passage'])}\nQuestion: {row['question'].strip()}?\nAnswer:"
    )
    if not isinstance(row["answer"], bool):
        raise TypeError("the answer is neither true nor false")
    return prompt, ("yes" if row["answer"] else "no",)


def grade_closed_domain_qa(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """The first "yes" or "no" counts."""
    prediction = metrics.first_word_among(output, ("yes", "no"))
    return {"prediction": prediction, "correct": prediction == answers[0]}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("reasoning", "test-reasoning.jsonl", read_reasoning, grade_reasoning, 16),
        Task("nli", "test-NLI.tsv", read_nli, grade_nli, 5, positive="true"),
        Task("open_domain_qa", "test-OpenDomainQA.jsonl", read_open_domain_qa, grade_open_domain_qa, 24),
        Task(
            "closed_domain_qa",
            "test-ClosedDomainQA.jsonl",
            read_closed_domain_qa,
            grade_closed_domain_qa,
            5,
            positive="yes",
        ),
    )
}
