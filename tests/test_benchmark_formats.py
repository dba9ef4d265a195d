"""Benchmarks in their published shapes: small files made here, read into facts and tests, scored and summarised."""

from __future__ import annotations

import csv
import json
import logging
import string
from dataclasses import replace

import pytest
from test_evaluate_run import make_run, tiny_model, tiny_tokenizer

from sphere.data.formats import Probe, Question
from sphere.data.records import FILES, load_records, shuffled
from sphere.errors import SphereError
from sphere.evaluation.case_file import CaseFile
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.further_tables import format_summary
from sphere.evaluation.scoring import compare_predictions, score_records
from sphere.evaluation.summary import summarise


def rewrite(subject, new, true):
    return {
        "prompt": "{} is a citizen of",
        "question": f"Of which country is {subject} a citizen?",
        "subject": subject,
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "relation_id": "P27",
    }


def mquake(case_id, *rewrites):
    return {
        "case_id": case_id,
        "requested_rewrite": list(rewrites),
        "questions": [f"Wording {i} of case {case_id}?" for i in range(3)],
        "answer": "Rome",
        "answer_alias": [],
        "new_answer": "Oslo",
        "new_answer_alias": ["Kristiania"],
        "single_hops": [],
        "new_single_hops": [
            {"question": "?", "cloze": "Ann is a citizen of", "answer": "Peru", "answer_alias": []},
            {"question": "?", "cloze": "The capital of Peru is", "answer": "Oslo", "answer_alias": []},
        ],
    }


def query(prompt, *values):
    return {"prompt": prompt, "answers": [{"value": value, "aliases": [value.lower()]} for value in values]}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Leonardo DiCaprio is Syria.",
        "subject_id": "Q38111",
        "target_id": "Q858",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Leonardo DiCaprio is United States of America."
        },
    },
    "Relation_Specificity": [
        {
            "test_queries": [query("The name of the mother of Leonardo DiCaprio is", "Irmelin")],
            "test_condition": "OR",
            "condition_queries": [query("The name of the mother of Leonardo DiCaprio is", "Irmelin")],
        }
    ],
    "Logical_Generalization": [],
    "Subject_Aliasing": [
        {
            "test_queries": [query("The name of the country of citizenship of Leo is", "Syria")],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [
                query("The capital of his country is", "Damascus"),
                query("Its head of state is", "Ann"),
            ],
            "test_condition": "AND",
            "condition_queries": [],
        },
        {"test_queries": [query("Nobody knows")], "test_condition": "OR", "condition_queries": []},
    ],
    "Compositionality_II": [],
    "Forgetfulness": [],
}


def ripple(test):
    return RIPPLE | {"Forgetfulness": [test]}


WIKI_BIG_EDIT = {
    "tag": "new",
    "subject": "Kabataş",
    "update": "In which country is Kabataş located?",
    "ans": "Turkey",
    "rephrase": "What is the country of Kabataş?",
    "personas": "Arr, where be Kabataş?",
    "mhop": "What is the capital of the country of Kabataş?",
    "mhop_ans": "Ankara",
    "loc": "In which country is Kinzig?",
    "loc_ans": "Germany",
    "relation_id": "P17",
    "object_id": "Q43",
}
ULTRA = {
    "prompt": "Where was Anne Smith born?",
    "ans": "Bonn",
    "rephrase_prompt": "Anne Smith came to life where?",
    "loc": "Who wrote Faust?",
    "loc_ans": "Goethe",
}
KNOWEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "ground_truth": ["Bonn"],
    "portability": {
        "Reasoning": [{"prompt": "Leo Arons died in the country", "ground_truth": [["Germany", "DE"]]}],
        "Subject_Aliasing": [{"prompt": "L. Arons died in", "ground_truth": "Berlin"}],
    },
    "locality": {"Relation_Specificity": [{"prompt": "Leo Arons was a", "ground_truth": [["physicist"]]}]},
}
HALLU = {
    "subject": "Mona Lisa",
    "relation": "creator",
    "object": "Leonardo",
    "question": "Who painted Mona Lisa?",
    "paraphrased_question": "Whose work is Mona Lisa?",
    "yes_question": "Did Leonardo paint Mona Lisa?",
    "no_question": "Did Raphael paint Mona Lisa?",
    "multiple_choice_with_letters": "A. Leonardo B. Raphael",
    "multiple_choice_labels": "A",
    "reversed_relation_question": "What did Leonardo paint?",
    "question_2hop": "Where was the painter of Mona Lisa born?",
    "answer_2hop": "Vinci",
    "question_3hop": "",
    "answer_3hop": "",
    "locality_question": "Who wrote Faust?",
}


def write(folder, name, entries):
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    else:
        path.write_text(json.dumps(entries), "utf-8")
    return folder


def load(folder, name, *entries, limit=None):
    return load_records(name, write(folder, name, entries), limit)


def test_a_case_of_several_edits_stays_together_and_is_asked_at_its_end(tmp_path):
    cases = [
        mquake(7, rewrite("Ann", "Peru", "Chile"), rewrite("Bob", "Cuba", "Fiji")),
        mquake(9, rewrite("Cid", "Togo", "Mali")),
        mquake(11, rewrite("Dan", "Laos", "Oman"), rewrite("Eve", "Iran", "Iraq")),
    ]
    records = load(tmp_path, "mquake_cf", *cases)
    assert (
        [record.case_id for record in records]
        == [record.request.case_id for record in records]
        == [*range(5)]
    )
    assert [record.group for record in records] == [7, 7, 9, 11, 11]
    assert [[p.metric for p in record.probes] for record in records] == [
        [],
        ["multi_hop", "instance_wise"],
        ["multi_hop", "instance_wise"],
        [],
        ["multi_hop", "instance_wise"],
    ]
    asked, hops = records[1].probes
    assert [q.answers for q in asked.questions] == [("Oslo", "Kristiania")] * 3
    assert (asked.every, hops.every) == (False, True)
    assert records[0].request.text == "Ann is a citizen of"
    assert load(tmp_path, "mquake_cf", *cases, limit=4) == records[:3]  # the third case is whole or not there
    with pytest.raises(SphereError, match=r"first case .* has more edits than the limit of 1"):
        load(tmp_path, "mquake_cf", *cases, limit=1)
    for seed in range(5):
        order = shuffled(records, seed)
        assert sorted(r.case_id for r in order) == [*range(5)]
        for first in (0, 3):
            at = [r.case_id for r in order].index(first)
            assert order[at + 1].case_id == first + 1


def test_ripple_edits_find_subject_and_object_in_the_sentence(tmp_path):
    (record,) = load(tmp_path, "ripple_popular", RIPPLE)
    request = record.request
    assert (request.prompt, request.subject, request.target_new) == (
        "The name of the country of citizenship of {} is",
        "Leonardo DiCaprio",
        "Syria",
    )
    assert [p.metric for p in record.probes] == [
        "Compositionality_I",
        "Subject_Aliasing",
        "Relation_Specificity",
    ]
    assert [p.every for p in record.probes] == [True, False, False]
    assert record.probes[2].conditions[0].answers == ("Irmelin", "irmelin")
    without = {key: value for key, value in RIPPLE.items() if key in ("example_type", "edit")}
    assert (
        load(tmp_path, "ripple_random", without)[0].request == request
    )  # what the replaced fact has otherwise


def test_records_without_a_usable_subject_are_skipped_and_counted(tmp_path, caplog):
    elsewhere = WIKI_BIG_EDIT | {"subject": "Kabatas quarter"}
    with caplog.at_level(logging.WARNING):
        records = load(tmp_path, "wiki_big_edit", elsewhere, WIKI_BIG_EDIT, elsewhere, WIKI_BIG_EDIT)
    assert [record.case_id for record in records] == [1, 3]
    assert (
        "2 records cannot be edited and are left out (record 0: its subject 'Kabatas quarter'" in caplog.text
    )
    assert [
        record.case_id for record in load(tmp_path, "wiki_big_edit", elsewhere, WIKI_BIG_EDIT, limit=1)
    ] == [1]
    with pytest.raises(SphereError, match=r"None of the records of .* can be edited"):
        load(tmp_path, "ultra_edit_bench", ULTRA | {"prompt": "where is it?"})


def test_what_the_others_ask(tmp_path):
    (wiki,) = load(tmp_path, "wiki_big_edit", WIKI_BIG_EDIT | {"mhop": None, "mhop_ans": None}, limit=1)
    assert [p.metric for p in wiki.probes] == ["personas"]
    (ultra,) = load(tmp_path, "ultra_edit_bench", ULTRA)
    assert (ultra.request.subject, ultra.neighborhood) == ("Anne Smith", (("Who wrote Faust?", "Goethe"),))
    (know,) = load(tmp_path, "knowedit_recent", KNOWEDIT)
    assert {p.metric: p.questions[0].answers for p in know.probes} == {
        "portability_Reasoning": ("Germany", "DE"),
        "portability_Subject_Aliasing": ("Berlin",),
        "locality_Relation_Specificity": ("physicist",),
    }
    changed = {"concept": "Leo Arons", "text": "Leo Arons died in", "labels": ["Berlin"]}
    (other,) = load(tmp_path, "knowedit_counterfact", changed)
    assert (other.request.prompt, other.request.target_new) == ("{} died in", "Berlin")
    (hallu,) = load(tmp_path, "hallu_edit_bench", HALLU)
    assert {p.metric: p.questions[0].answers for p in hallu.probes} == {
        "generalization_yes": ("Yes",),
        "generalization_no": ("No",),
        "generalization_multiple_choice": ("A",),
        "generalization_reversed_relation": ("Mona Lisa",),
        "portability_2hop": ("Vinci",),
        "locality": (),
    }


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("mquake_cf", mquake(1), "'requested_rewrite' should be a list of at least one object"),
        (
            "mquake_cf",
            {**mquake(1, rewrite("A", "B", "C")), "new_answer": 5},
            "'new_answer' should be a text, got 5",
        ),
        ("ripple_recent", {"edit": "x"}, "'edit' should be an object"),
        ("wiki_big_edit", {"update": "x"}, "the key 'ans' is missing"),
        ("knowedit_recent", KNOWEDIT | {"target_new": []}, "the key 'target_new' is missing"),
        ("ultra_edit_bench", ["x"], "it is a list, not an object with keys"),
        ("hallu_edit_bench", HALLU | {"object": ""}, "'object' is blank"),
        ("knowedit_recent", KNOWEDIT | {"portability": ["x"]}, "'portability' should be an object"),
        (
            "knowedit_recent",
            KNOWEDIT | {"portability": {"Reasoning": ["x"]}},
            "'Reasoning' should be a list of obj",
        ),
        (
            "knowedit_recent",
            KNOWEDIT | {"locality": {"Forgetfulness": 5}},
            "'Forgetfulness' should be a list",
        ),
        (
            "ripple_recent",
            RIPPLE | {"Forgetfulness": ["x"]},
            "'Forgetfulness' should be a list of objects, got 'x'",
        ),
        ("ripple_recent", ripple({"test_queries": ["x"]}), "'test_queries' should be a list of objects"),
        (
            "ripple_recent",
            ripple({"test_queries": [{"answers": ["b"]}]}),
            "'answers' should be a list of objects",
        ),
        (
            "ripple_recent",
            ripple({"test_queries": [{"prompt": "a", "answers": [{"value": "b", "aliases": "cd"}]}]}),
            "'aliases' should be a list, got 'cd'",
        ),
        (
            "mquake_cf",
            mquake(1, rewrite("A", "B", "C")) | {"new_single_hops": ["x"]},
            "'new_single_hops' should be a list of objects",
        ),
    ],
)
def test_an_unsound_record_is_named(name, entry, message, tmp_path):
    with pytest.raises(SphereError, match=r"Record 0 of .* cannot be used") as error:
        load(tmp_path, name, entry)
    assert message in str(error.value)


def test_empty_cells_of_a_csv_are_skipped_whatever_their_column(tmp_path):
    needed = ("subject", "object", "question")
    (record,) = load(tmp_path, "hallu_edit_bench", {k: v if k in needed else "" for k, v in HALLU.items()})
    assert (record.request.target_new, record.paraphrase_prompts, record.probes) == ("Leonardo", (), ())


def test_a_file_that_is_not_there_is_asked_for_by_its_home(tmp_path):
    with pytest.raises(
        SphereError, match=r"get the published file from https://github.com/princeton-nlp/MQuAKE"
    ):
        load_records("mquake_cf", tmp_path)


# ---- scores ----


def known(model, tokenizer):
    """A prompt of one letter and the printable character that the model says next."""
    for prompt in string.ascii_letters:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = tokenizer.decode(model(ids).logits[0, -1:].argmax(-1))
        if said.isascii() and said.isprintable() and said.strip():
            return Question(prompt, (said,))
    raise AssertionError("the model says nothing that can be read")


def test_a_test_is_passed_by_one_or_by_every_question_and_counts_where_its_condition_holds(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    record = load(tmp_path, "ripple_popular", RIPPLE)[0]
    record = replace(record, request=replace(record.request, joiner=""))
    right = known(model, tokenizer)
    wrong = Question(right.prompt, ("%" if right.answers != ("%",) else "&",))
    probes = (
        Probe("any", (wrong, right)),
        Probe("all", (wrong, right), every=True),
        Probe("met", (right,), conditions=(right,)),
        Probe("met", (wrong,), conditions=(right, wrong)),
        Probe("kept", (Question("A", ()),)),
    )
    cases = score_records(model, tokenizer, [replace(record, probes=probes)], progress=False)
    compare_predictions(cases, cases)
    found = summarise(cases)
    means = {name: found[f"{name}_accuracy"]["mean"] for name in ("any", "all", "met")}
    assert means == {"any": 100, "all": 0, "met": 100}  # the second "met" does not count
    assert "kept_accuracy" not in found  # it has no answer to be forced


def test_a_run_of_a_benchmark_has_its_metrics(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_run(tmp_path, model)
    entries = [HALLU | {"subject": f"Mona {i}", "question": f"Who painted Mona {i}?"} for i in range(9)]
    records = [
        replace(r, case_id=10 + r.case_id, request=replace(r.request, case_id=10 + r.case_id))
        for r in load(tmp_path, "hallu_edit_bench", *entries)
    ]
    summary = evaluate_run(model, tokenizer, tmp_path, records, progress=False)
    metrics = summary["checkpoints"][-1]["metrics"]
    assert {"efficacy_accuracy", "portability_2hop_accuracy", "generalization_yes_accuracy"} <= metrics.keys()
    assert metrics["portability_2hop_accuracy"]["n"] == 9
    assert "portability_2hop" in format_summary(summary)
    header = json.loads((tmp_path / "summary" / "cases_edit_9.jsonl").read_text().splitlines()[0])
    file = CaseFile(tmp_path / "summary" / "cases_edit_9.jsonl", header)
    assert file.get(records[0]) is not None
    assert file.get(replace(records[0], probes=())) is None  # other tests are scored anew
