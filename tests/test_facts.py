"""Anyone's facts as records: columns by any of their names, subjects that no column names, rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphere.data.facts import Facts, read_facts, repeated
from sphere.data.records import Record
from sphere.data.subjects import SubjectFinder
from sphere.errors import SphereError
from sphere.requests import EditRequest

QUESTION = "What is the capital of France?"
PARIS = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}


def facts_of(folder: Path, *rows: dict[str, Any], subjects: tuple[str, ...] = ()) -> Facts:
    """The facts of a table of these rows."""
    path = folder / "facts.json"
    path.write_text(json.dumps(rows))
    return read_facts(path, subjects)


def only(folder: Path, **row: Any) -> Record:
    """The record of one good row."""
    facts = facts_of(folder, row)
    assert not facts.bad
    (record,) = facts.records
    return record


def test_a_whole_row(tmp_path: Path) -> None:
    record = only(
        tmp_path,
        **PARIS,
        case_id=7,
        target_true="Paris",
        paraphrases=["{} has its government in", "France's first city is"],
        neighborhood=[{"prompt": "The capital of Spain is", "answer": "Madrid"}, ["Bonn is in", "Germany"]],
    )
    assert record == Record(
        7,
        EditRequest(7, "The capital of {} is", "France", "Rome", "Paris"),
        paraphrase_prompts=("France has its government in", "France's first city is"),
        neighborhood=(("The capital of Spain is", "Madrid"), ("Bonn is in", "Germany")),
    )


def test_cells_of_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "Prompt,Subject,Target New,paraphrases,neighborhood\n"
        "The capital of France is,France,Rome,France is ruled from | The French president lives in,"
        "The capital of Spain is => Madrid | Lyon is in\n"
        "Einstein was born in,Einstein,1999,,\n"
    )
    facts = read_facts(path)
    first, second = facts.records
    assert (first.case_id, second.case_id) == (1, 2)
    assert facts.numbers == {1: 2, 2: 3}
    assert first.request.prompt == "The capital of {} is"
    assert first.paraphrase_prompts == ("France is ruled from", "The French president lives in")
    assert first.neighborhood == (("The capital of Spain is", "Madrid"), ("Lyon is in", None))
    assert second.request.target_new == "1999"
    assert second.neighborhood == ()


@pytest.mark.parametrize(
    "row",
    [
        {"src": QUESTION, "alt": "Rome", "answers": ["Paris"], "subject": "France"},
        {"question": QUESTION, "answer": "Rome", "ground_truth": "Paris", "subject": "France"},
        {"prompts": QUESTION, "labels": ["Rome"], "ground_truth": ["Paris"], "concept": "France"},
        {"update": QUESTION, "ans": "Rome", "target_true": {"str": "Paris"}, "subject": "France"},
    ],
)  # fmt: skip
def test_columns_by_the_names_of_others(tmp_path: Path, row: dict[str, Any]) -> None:
    facts = facts_of(tmp_path, row)
    assert facts.records[0].request == EditRequest(1, "What is the capital of {}?", "France", "Rome", "Paris")
    assert any(note.startswith("Read '") for note in facts.notes)


def test_the_locality_columns_of_others(tmp_path: Path) -> None:
    record = only(
        tmp_path, **PARIS, rephrase="France is ruled from", loc="who wrote Hamlet", loc_ans="Shakespeare"
    )
    assert record.paraphrase_prompts == ("France is ruled from",)
    assert record.neighborhood == (("who wrote Hamlet", "Shakespeare"),)


@pytest.mark.parametrize("answers", [["Madrid", None], ["Madrid", float("nan")], '["Madrid", NaN]'])
def test_a_neighbor_without_an_answer_has_none(tmp_path: Path, answers: object) -> None:
    neighbors = ["The capital of Spain is", "Lyon is in => France"]
    record = only(tmp_path, **PARIS, neighborhood=neighbors, neighborhood_answer=answers)
    assert record.neighborhood == (("The capital of Spain is", "Madrid"), ("Lyon is in", "France"))
    record = only(tmp_path, **PARIS, neighborhood=["Lyon is in", "Bonn is in"], neighborhood_answer=[None, 1])
    assert record.neighborhood == (("Lyon is in", None), ("Bonn is in", "1"))


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
def test_nan_is_an_empty_cell(tmp_path: Path, name: str) -> None:
    nan = float("nan")
    row = {"case_id": nan, "prompt": "The capital of France is", "subject": nan, "target_new": "Rome"}
    row |= {"target_true": nan, "paraphrases": nan, "neighborhood": nan, "joiner": nan}
    text = json.dumps(row)
    (path := tmp_path / name).write_text(f"[{text}]" if name == "facts.json" else text)
    facts = read_facts(path)
    assert not facts.bad
    assert facts.records == [Record(1, EditRequest(1, "The capital of {} is", "France", "Rome"))]


def test_columns_without_a_use_are_named(tmp_path: Path) -> None:
    assert "Not used: tag." in facts_of(tmp_path, {**PARIS, "tag": "x"}).notes


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of France is", "France"),
        ("What is the mother tongue of Danielle Darrieux?", "Danielle Darrieux"),
        ("The University of New South Wales was founded in", "University of New South Wales"),
        ("The author of The Lord of the Rings is", "The Lord of the Rings"),
        ("What year was the iPhone 4 released by Apple Computer Company?", "Apple Computer Company"),
    ],
)
def test_a_subject_is_found_by_its_spelling(tmp_path: Path, prompt: str, subject: str) -> None:
    facts = facts_of(tmp_path, {"prompt": prompt, "target_new": "x"})
    assert facts.records[0].request.subject == subject
    assert any("name no subject" in note for note in facts.notes)


def test_a_list_of_subjects_goes_first_and_its_longest_name(tmp_path: Path) -> None:
    row = {"prompt": "In the opera house of la Scala in Milan they play", "target_new": "chess"}
    names = ("opera house", "opera house of la Scala", "Rome")
    assert facts_of(tmp_path, row, subjects=names).records[0].request.subject == "opera house of la Scala"
    assert SubjectFinder(["art"]).find("the party of the left") is None  # no part of a word


def test_subjects_that_other_rows_name_are_known(tmp_path: Path) -> None:
    facts = facts_of(
        tmp_path,
        {"prompt": "the iphone is made by", "subject": "iphone", "target_new": "Nokia"},
        {"prompt": "the screen of the iphone is made of", "subject": "", "target_new": "wood"},
    )
    assert [record.request.subject for record in facts.records] == ["iphone", "iphone"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "something is", "target_new": "x"}, "no subject is named, and none is plain"),
        ({"prompt": "Bonn or Rome is", "target_new": "x"}, "none is plain"),
        ({"prompt": "{} is in", "target_new": "x"}, "no column names the subject"),
        ({**PARIS, "prompt": "The capital of Spain is"}, "its subject 'France' is not in its prompt"),
        ({**PARIS, "target_new": " "}, "its target_new is blank"),
        ({**PARIS, "target_new": None}, "its target_new is missing"),
        ({**PARIS, "target_true": "Rome"}, "the same text"),
        ({**PARIS, "case_id": "x"}, "no whole number"),
        ({**PARIS, "case_id": 1.7}, "case_id 1.7 is no whole number"),
        ({**PARIS, "case_id": float("inf")}, "case_id inf is no whole number"),
        ({**PARIS, "case_id": True}, "case_id True is no whole number"),
        ({**PARIS, "subject": float("nan")}, "no column names the subject"),
        ({**PARIS, "target_new": float("nan")}, "its target_new is missing"),
        ({**PARIS, "target_new": float("inf")}, "its target_new should be a text, got inf"),
        ({**PARIS, "neighborhood": "a", "neighborhood_answer": [["Paris"]]}, "should be a text, got ['Paris']"),
        ({**PARIS, "neighborhood": [{"prompt": "a", "answer": {"b": 1}}]}, "should be a text, got {'b': 1}"),
        ({**PARIS, "case_id": 1}, "is that of row 1"),
        ({**PARIS, "neighborhood": ["a", "b"], "neighborhood_answer": ["c"]}, "2 neighborhood prompts but 1 answers"),
        ({**PARIS, "paraphrases": [1]}, "paraphrases should be texts"),
        ({**PARIS, "target_new": "\ud800"}, "surrogate"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_apart(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    facts = facts_of(tmp_path, {**PARIS, "case_id": 1}, row)
    assert [record.case_id for record in facts.records] == [1]
    (bad,) = facts.bad
    assert bad.number == 2
    assert says in bad.reason


@pytest.mark.parametrize("column", ["prompt", "target_new"])
def test_a_column_that_every_fact_needs(tmp_path: Path, column: str) -> None:
    with pytest.raises(SphereError, match=f"no column for the {column}"):
        facts_of(tmp_path, {key: value for key, value in PARIS.items() if key != column})


def test_repetitions_and_contradictions_are_told(tmp_path: Path) -> None:
    facts = facts_of(
        tmp_path,
        PARIS,
        PARIS,
        {**PARIS, "prompt": "the capital of  {} is", "target_new": "rome."},
        {**PARIS, "target_new": "Bonn"},
        {**PARIS, "subject": "Spain"},
    )
    first, second, third = repeated(facts)
    assert "Row 2 repeats row 1" in first
    assert "Row 3 nearly repeats row 1" in second
    assert "Row 4 contradicts row 1" in third


def test_a_row_says_what_stands_between_prompt_and_target(tmp_path: Path) -> None:
    rows = [PARIS, {**PARIS, "joiner": None}, {**PARIS, "joiner": ""}, {**PARIS, "joiner": " -> "}]
    assert [r.request.joiner for r in facts_of(tmp_path, *rows).records] == [None, None, "", " -> "]
    (bad,) = facts_of(tmp_path, {**PARIS, "joiner": 3}).bad
    assert "joiner should be a text" in bad.reason
