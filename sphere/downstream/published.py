"""The four downstream tasks in the form in which the paper's authors score them (arXiv 2510.01172, section 5).

Their prompts, lengths and ways of grading, for numbers that stand beside the paper's. Two-class tasks have a second
answer, that of the two words which is the likelier after the prompt. docs/downstream.md says how the tasks of
`sphere.downstream.tasks` differ. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphere.downstream.metrics import first_contained, published_metrics
from sphere.downstream.tasks import TASKS, Task
from sphere.evaluation.answer_match import soft_exact_match

PREFIX = "published_"  # of their names, beside those of `TASKS`
Row = Mapping[str, Any]


def read_reasoning(row: Row) -> tuple[str, tuple[str, ...]]:
    """GSM8K: the solution as it stands is the hint; what follows `#### ` is the answer."""
    hint, found, answer = row["answer"].partition("#### ")
    prompt = (
        f"Q: {row['question']} A:Let's think step by step. {hint} Therefore, the answer (arabic numerals) is:"
    )
    return prompt, (answer.strip(),) if found and answer.strip() else ()


def read_nli(row: Row) -> tuple[str, tuple[str, ...]]:
    """RTE."""
    classes = {"entailment": "true", "not_entailment": "false"}
    prompt = f"{row['sentence1']} entails {row['sentence2']}. True or False? answer:"
    return prompt, (classes[row["label"].strip()],)


def read_open_domain_qa(row: Row) -> tuple[str, tuple[str, ...]]:
    """Natural Questions with a passage that a model has written for the question."""
    prompt = (
        "Refer to the passage below and answer the following question.\n"
        f"Passage: {row['output'][0]}\nQuestion: {row['question']}\nAnswer:"
    )
    return prompt, tuple(str(answer) for answer in row["answer"])


def read_closed_domain_qa(row: Row) -> tuple[str, tuple[str, ...]]:
    """BoolQ with its passage."""
    prompt = (
        "Please answer the given question based on the passage. The answer should be exact 'yes' or 'no'. "
        f"passage: {row['passage']} question: {row['question']}. answer: "
    )
    if not isinstance(row["answer"], bool):
        raise TypeError("the answer is neither true nor false")
    return prompt, ("yes" if row["answer"] else "no",)


def grade_reasoning(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """The gold number's text occurs in the output."""
    return {"prediction": output.strip() or None, "correct": answers[0] in output}


def grade_open_domain_qa(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """An answer's words occur, together and in order; both normalised."""
    return {"prediction": output.strip() or None, "correct": soft_exact_match(output, answers)}


def grade_nli(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """The output holds "true", or else "false"."""
    return _two_classes(output, ("true", "false"), answers)


def grade_closed_domain_qa(output: str, answers: tuple[str, ...]) -> dict[str, Any]:
    """The output holds "yes", or else "no"."""
    return _two_classes(output, ("yes", "no"), answers)


def _two_classes(output: str, words: tuple[str, ...], answers: tuple[str, ...]) -> dict[str, Any]:
    prediction = first_contained(output, words)
    return {"prediction": prediction, "correct": prediction == answers[0]}


def _task(name: str, read: Any, grade: Any, tokens: int, choices: tuple[tuple[str, str], ...] = ()) -> Task:
    summarise = published_metrics
    return Task(
        f"{PREFIX}{name}", TASKS[name].file, read, grade, tokens, choices=choices, summarise=summarise
    )


PUBLISHED: dict[str, Task] = {
    "reasoning": _task("reasoning", read_reasoning, grade_reasoning, 5),
    "nli": _task("nli", read_nli, grade_nli, 1, (("true", "True"), ("false", "False"))),
    "open_domain_qa": _task("open_domain_qa", read_open_domain_qa, grade_open_domain_qa, 20),
    "closed_domain_qa": _task(
        "closed_domain_qa", read_closed_domain_qa, grade_closed_domain_qa, 1, (("yes", "yes"), ("no", "no"))
    ),
}
