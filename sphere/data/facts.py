"""Anyone's facts: rows of a table as records, each column found by what this field calls it.

    prompt,subject,target_new
    The mother tongue of {} is,Danielle Darrieux,English

A row says what to complete (`prompt`, with "{}" or the subject itself in it, or `question`) and what is true now
(`target_new` or `answer`). A subject that no column names is looked for in the prompt. What a row lacks for being
measured, the answer that is replaced and neighbors' answers, is asked of the unedited model
(`sphere.evaluation.unedited_answers`). Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphere.data.formats import Record
from sphere.data.subjects import SubjectFinder, with_place
from sphere.data.tables import Row, parse_json, read_table
from sphere.errors import SphereError
from sphere.requests import EditRequest, check_text

# Our name -> what other tables call it (zsRE, CounterFact, EasyEdit, KnowEdit, WikiBigEdit, UltraEditBench, ...).
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompts", "cloze", "text"),
    "question": ("src", "update"),
    "subject": ("concept", "entity"),
    "target_new": ("answer", "ans", "alt", "labels", "label", "object", "new_answer", "target"),
    "target_true": ("ground_truth", "answers", "old_answer", "true_answer"),
    "paraphrases": (
        "paraphrase",
        "paraphrase_prompts",
        "rephrase",
        "rephrase_prompt",
        "rephrase_prompts",
        "paraphrased_question",
        "equiv_prompt",
    ),
    "neighborhood": ("neighborhood_prompts", "loc", "locality_prompt", "unrel_prompt"),
    "neighborhood_answer": ("loc_ans", "locality_answer", "locality_ground_truth", "unrel_ans"),
    "case_id": ("id",),
    "joiner": (),
}
ARROW, BAR = "=>", "|"  # in a cell: "prompt => answer | prompt => answer"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        number: its line, or its place in a JSON list, from 1.
        reason: one sentence.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Facts:
    """What a table holds.

    Attributes:
        records: of the good rows, in their order; answers that no row gives are None.
        numbers: case_id -> number of its row.
        bad: the other rows.
        notes: sentences on how columns were read and what was found out.
    """

    records: list[Record]
    numbers: dict[int, int]
    bad: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_facts(source: str | Path, subjects: Iterable[str] = (), *, subject_needed: bool = True) -> Facts:
    """The facts of a table (`sphere.data.tables`).

    Args:
        source: a file, or "-" for standard input.
        subjects: names to look for where a row has no subject.
        subject_needed: whether a row whose subject is neither named nor plain is bad; else its prompt stands for it.

    Raises:
        SphereError: the table cannot be read, or lacks a column that every fact needs.
    """
    rows = read_table(source)
    names, notes = _columns(rows)
    finder = SubjectFinder([*subjects, *_named_subjects(rows, names)])
    records: list[Record] = []
    numbers: dict[int, int] = {}
    bad: list[BadRow] = []
    found = 0
    for place, row in enumerate(rows, 1):
        values = {ours: row.values.get(theirs) for ours, theirs in names.items()}
        try:
            record = _record(values, place, finder, subject_needed)
            if (first := numbers.get(record.case_id)) is not None:
                raise SphereError(f"its case_id {record.case_id} is that of row {first}: renumber one")
        except SphereError as error:
            bad.append(BadRow(row.number, str(error)))
            continue
        records.append(record)
        numbers[record.case_id] = row.number
        found += not _filled(values.get("subject"))
    if found:
        where = "was found in the prompt" if subject_needed else "was found in the prompt, or is all of it"
        notes.append(f"{found} rows name no subject: it {where}.")
    return Facts(records, numbers, bad, notes)


def repeated(facts: Facts) -> list[str]:
    """Sentences on facts that repeat or contradict others, up to case, blanks and punctuation."""
    seen: dict[str, Record] = {}
    sentences = []
    for record in facts.records:
        first = seen.setdefault(_folded(record.request.text), record)
        if first is record:
            continue
        here, there = facts.numbers[record.case_id], facts.numbers[first.case_id]
        same = _folded(first.request.target_new) == _folded(record.request.target_new)
        exact = first.request.text == record.request.text
        what = "repeats" if same and exact else "nearly repeats" if same else "contradicts"
        sentences.append(
            f"Row {here} {what} row {there}: {record.request.text!r} -> {record.request.target_new.strip()!r} and "
            f"{first.request.target_new.strip()!r}."
        )
    return sentences


def _folded(text: str) -> str:
    kept = (c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(kept).split())


def _columns(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """Our name of a column -> the table's, and sentences on what was understood and what is not used."""
    present = list(dict.fromkeys(key for row in rows for key in row.values if key))
    known = {_spelled(theirs): theirs for theirs in reversed(present)}
    names: dict[str, str] = {}
    for ours, others in COLUMNS.items():
        if match := next((known[name] for name in (ours, *others) if name in known), None):
            names[ours] = match
    if "target_new" not in names and "target_true" in names and _spelled(names["target_true"]) == "answers":
        names["target_new"] = names.pop("target_true")  # zsRE without its distractor: what is true is written
    for needed, either in (("prompt", ("prompt", "question")), ("target_new", ("target_new",))):
        if not any(name in names for name in either):
            spellings = ", ".join(dict.fromkeys(n for name in either for n in (name, *COLUMNS[name])))
            raise SphereError(
                f"The table has no column for the {needed} (one of {spellings}); it has {', '.join(present)}: rename "
                "one.",
                argument="facts",
            )
    renamed = [f"'{theirs}' as {ours}" for ours, theirs in names.items() if _spelled(theirs) != ours]
    unused = [column for column in present if column not in names.values()]
    notes = [f"Read {', '.join(renamed)}."] if renamed else []
    return names, notes + ([f"Not used: {', '.join(unused)}."] if unused else [])


def _spelled(name: str) -> str:
    """A column's name as `COLUMNS` spells it."""
    return re.sub(r"[\s\-.]+", "_", name.strip().lower())


def _named_subjects(rows: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    column = names.get("subject")
    values = [row.values.get(column) for row in rows] if column else []
    return [value for value in values if isinstance(value, str) and value.strip()]


def _record(values: Mapping[str, Any], place: int, finder: SubjectFinder, subject_needed: bool) -> Record:
    """The record of one row; `place` numbers it where no column does."""
    case_id = _number(values.get("case_id"), place)
    asked = "prompt" if _filled(values.get("prompt")) else "question"
    prompt, target = _text(values, asked), _text(values, "target_new")
    named = _filled(values.get("subject"))
    subject = _text(values, "subject") if named else _found(prompt, finder, subject_needed)
    if "{}" not in prompt:
        template = with_place(prompt, subject)
        if template is None:
            raise SphereError(
                f"its subject {subject!r} is not in its {asked} {prompt!r}: write it there, or '{{}}' in its place"
            )
        prompt = template
    true = _text(values, "target_true") if _filled(values.get("target_true")) else None
    request = EditRequest(case_id, prompt, subject, target, true, _joiner(values))
    return Record(
        case_id,
        request,
        "counterfact",
        paraphrase_prompts=_paraphrases(values.get("paraphrases"), subject),
        neighborhood=_neighborhood(values),
    )


def _found(prompt: str, finder: SubjectFinder, needed: bool) -> str:
    if "{}" in prompt:
        raise SphereError(f"its prompt {prompt!r} has '{{}}', but no column names the subject: add one")
    subject = finder.find(prompt)
    if subject is None and not needed:
        return prompt
    if subject is None:
        raise SphereError(
            f"no subject is named, and none is plain in {prompt!r}: add a column 'subject', or a list of subjects"
        )
    return subject


def _filled(value: Any) -> bool:
    """Whether a cell holds anything."""
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def _number(value: Any, default: int) -> int:
    if not _filled(value):
        return default
    wrong = SphereError(f"its case_id {value!r:.60} is no whole number")
    try:
        number = int(value)
    except (OverflowError, TypeError, ValueError):
        raise wrong from None
    if isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise wrong
    return number


def _text(values: Mapping[str, Any], name: str) -> str:
    """The text of a cell: itself, the first of a list, or the "str" of an object, as CounterFact has it."""
    value = values.get(name)
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, dict) and "str" in value:
        value = value["str"]
    if value is None or value == []:
        raise SphereError(f"its {name} is missing")
    return _written(value, f"its {name}")


def _written(value: Any, name: str) -> str:
    """A text, or a number as one; `name` is what an error calls it."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # a year, a number of inhabitants
    if isinstance(value, float) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        raise SphereError(f"{name} should be a text, got {value!r:.60}")
    check_text(value, name)
    return value


def _joiner(values: Mapping[str, Any]) -> str | None:
    """The text of a cell, which may be empty: nothing stands between then."""
    joiner = values.get("joiner")
    if joiner is not None and not isinstance(joiner, str):
        raise SphereError(f"its joiner should be a text, got {joiner!r:.60}")
    return joiner


def _list(value: Any) -> list[Any]:
    """A cell of several: a list, a JSON list written as text, or texts between bars."""
    if not _filled(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError):  # else a text that begins with a bracket
            value = parse_json(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(BAR) if part.strip()]
    if not isinstance(value, list):
        value = [value]
    return value


def _paraphrases(value: Any, subject: str) -> tuple[str, ...]:
    texts = _list(value)
    for text in texts:
        if not isinstance(text, str):
            raise SphereError(f"its paraphrases should be texts, got {text!r:.60}")
        check_text(text, "one of its paraphrases")
    return tuple(text.replace("{}", subject) for text in texts)


def _neighborhood(values: Mapping[str, Any]) -> tuple[tuple[str, str | None], ...]:
    """(prompt, answer) of each neighbor; the answer is None where the row has none."""
    neighbors = [_neighbor(entry) for entry in _list(values.get("neighborhood"))]
    answers = _list(values.get("neighborhood_answer"))
    if answers and len(answers) != len(neighbors):
        raise SphereError(f"it has {len(neighbors)} neighborhood prompts but {len(answers)} answers to them")
    for place, answer in enumerate(answers):
        if answer is not None:
            neighbors[place] = neighbors[place][0], answer
    for prompt, _ in neighbors:
        check_text(prompt, "a prompt of its neighborhood")
    return tuple(
        (prompt, None if answer is None else _written(answer, "an answer of its neighborhood"))
        for prompt, answer in neighbors
    )


def _neighbor(entry: Any) -> tuple[str, Any]:
    """Its prompt, and its answer as it stands there."""
    if isinstance(entry, str):
        prompt, arrow, answer = entry.partition(ARROW)
        return (prompt.strip(), answer.strip()) if arrow else (entry, None)
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        given = entry.get("answer", entry.get("ground_truth"))
        while isinstance(given, list) and given:
            given = given[0]
        return entry["prompt"], None if given == [] else given
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    raise SphereError(
        f"a neighbor should be a text, {{'prompt', 'answer'}} or [prompt, answer], got {entry!r:.60}"
    )
