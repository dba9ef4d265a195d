"""Reference texts: published files, or what the records hold; and no reaching for the network in tests."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from sphere.data.records import Record, load_records
from sphere.errors import SphereError
from sphere.evaluation import reference_texts
from sphere.evaluation.reference_texts import IDF, SNIPPETS, VOCABULARY, load_references
from sphere.requests import EditRequest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches for the network; the files that were asked for."""
    asked = []

    def fetch(name, path):
        asked.append(name)
        raise SphereError(f"No {name} to be had.")

    monkeypatch.setattr(reference_texts, "fetch", fetch)
    return asked


def record(i, target="Rome", **changes):
    return Record(
        i,
        EditRequest(i, "The home of {} is", f"person {i}", target, "Oslo"),
        relation_id="P1",
        paraphrase_prompts=(f"person {i} lives in",),
        neighborhood=((f"The home of neighbor {i} is", None),),
        attribute_prompts=(f"The home of Roman {i} is",),
        generation_prompts=(f"person {i} likes", f"At home, person {i} often"),
        target_new_id="Q220",
        **changes,
    )


def publish(folder, samples, relation="P1", target="Q220"):
    folder.mkdir(exist_ok=True)
    entry = {"relation_id": relation, "target_id": target, "samples": samples}
    (folder / SNIPPETS).write_text(json.dumps([entry]))


SAMPLES = [
    {"name": "person 0", "text": "person 0 was born in Rome."},
    {"name": "Livia", "text": "Livia has a house in old Rome, and a garden."},
]


def test_published_references_and_vocabulary(tmp_path, offline):
    publish(tmp_path, SAMPLES)
    documents = ["Rome is a city", "a house in Oslo", "the garden of Livia"]
    fitted = TfidfVectorizer().fit(documents)
    np.save(tmp_path / IDF, fitted.idf_)
    (tmp_path / VOCABULARY).write_text(json.dumps({k: int(v) for k, v in fitted.vocabulary_.items()}))
    cases = [record(0), record(1), replace(record(2), target_new_id="Q585")]
    references = load_references(cases, cases, tmp_path)
    assert offline == []
    assert references.by_case[0].essence == (SAMPLES[0]["text"],)
    assert references.by_case[1].essence == ()
    texts = ["A house of Rome", "in the garden"]
    joined = [" ".join(texts), " ".join(sample["text"] for sample in SAMPLES)]
    expected = cosine_similarity(fitted.transform(joined))[0, 1]
    assert 0 < expected < 1
    assert references.similarity(texts, 0) == references.similarity(texts, 1) == pytest.approx(expected)
    assert references.similarity(["nothing known"], 0) == 0
    assert references.similarity(texts, 2) is None
    assert references.notes["reference_texts"].startswith("published: attribute_snippets.json; 1 of 3 cases")
    assert references.notes["tfidf_vocabulary"] == "published: idf.npy and tfidf_vocab.json"
    assert references.digest(0) != references.digest(1)


def test_vocabulary_of_published_texts(tmp_path, offline):
    publish(tmp_path, SAMPLES)
    references = load_references([record(0)], [record(0)], tmp_path)
    expected = TfidfVectorizer().fit([sample["text"] for sample in SAMPLES])
    assert references.vectorizer.vocabulary_ == expected.vocabulary_
    assert "fitted on the 2 texts of attribute_snippets.json" in references.notes["tfidf_vocabulary"]
    assert offline == [IDF]


def test_references_of_the_texts_at_hand(tmp_path, offline):
    here = record(0)
    true_elsewhere = Record(
        1,
        EditRequest(1, "{} dwells in", "Livia", "Bern", "Rome"),
        relation_id="P1",
        paraphrase_prompts=("Livia's town is",),
        neighborhood=(("Nero's town is", None), ("Nerva's town is", "Turin")),
        attribute_prompts=("Tell's town is",),
    )
    other_relation = replace(
        true_elsewhere, case_id=2, relation_id="P2", neighborhood=(("The pope is in", None),)
    )
    references = load_references([here], [here, true_elsewhere, other_relation], tmp_path)
    assert references.by_case[0].consistency == (
        "The home of Roman 0 is Rome.",
        "Livia dwells in Rome.",
        "Livia's town is Rome.",
        "Nero's town is Rome.",
    )
    assert references.by_case[0].essence == ()
    assert offline == [SNIPPETS]  # one attempt, then no more
    assert "could not be fetched" in references.notes["reference_texts"]
    assert "fitted on" in references.notes["tfidf_vocabulary"]


def test_no_attempt_for_references_without_ids(tmp_path, offline):
    cases = [replace(record(0), target_new_id=None)]
    references = load_references(cases, cases, tmp_path)
    assert offline == [IDF]
    assert "has no Wikidata ids" in references.notes["reference_texts"]


def test_published_texts_of_other_targets(tmp_path):
    publish(tmp_path, SAMPLES, target="Q1")
    references = load_references([record(0)], [record(0)], tmp_path)
    assert "knows none of the targets" in references.notes["reference_texts"]
    assert references.by_case[0].consistency == ("The home of Roman 0 is Rome.",)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", '[{"relation_id": "P1"}]', "nonsense"])
def test_unusable_snippets(tmp_path, content):
    (tmp_path / SNIPPETS).write_text(content)
    with pytest.raises(SphereError, match="attribute snippets"):
        load_references([record(0)], [record(0)], tmp_path)


def test_unusable_vocabulary(tmp_path):
    np.save(tmp_path / IDF, np.ones(3))
    (tmp_path / VOCABULARY).write_text('{"rome": 0}')
    with pytest.raises(SphereError, match=r"idf.npy and .*tfidf_vocab.json are not the published"):
        load_references([record(0)], [record(0)], tmp_path)


def test_the_starter_set_has_references(tmp_path):
    records = load_records("starter")
    references = load_references(records, records, tmp_path)
    assert sum(bool(texts.consistency) for texts in references.by_case.values()) > 0.9 * len(records)
