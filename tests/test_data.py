"""Reading the published formats, and the one sentence for each way in which a file can be wrong."""

from __future__ import annotations

import copy
import io
import json
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest

from sphere.data import records as data
from sphere.data.records import load_records
from sphere.errors import SphereError
from sphere.requests import EditRequest
from sphere.resources import shipped

SHARED = Path(__file__).parents[2] / "shared" / "data"
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux was born to speak"],
    "neighborhood_prompts": ["The mother tongue of Jean Gabin is", "Robert Schuman speaks"],
    "attribute_prompts": ["The mother tongue of Isaac Newton is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
ZSRE = {
    "subject": "Ant",
    "src": "What is the Important feature of Ant?",
    "pred": "x",
    "rephrase": "What about Ant?",
    "alt": "seven legs",
    "answers": ["six legs", "6 legs"],
    "loc": "nq question: who sang it",
    "loc_ans": "Nobody",
    "cond": "",
}


def write(folder, ds_name, entries):
    (folder / data.FILES[ds_name]).write_text(json.dumps(entries), "utf-8")
    return folder


def changed(entry, path, value=...):
    """A copy of `entry` with the value at `path` replaced, or removed."""
    entry = copy.deepcopy(entry)
    target = entry
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return entry


@pytest.mark.parametrize("ds_name", ["cf", "mcf", "starter"])
def test_counterfact(tmp_path, ds_name):
    in_list = changed(COUNTERFACT, ["requested_rewrite"], [COUNTERFACT["requested_rewrite"]])
    for entry in (COUNTERFACT, in_list):
        (record,) = load_records(ds_name, write(tmp_path, ds_name, [entry]))
        assert record.case_id == record.request.case_id == 7
        assert record.kind == "counterfact"
        assert record.request.text == "The mother tongue of Danielle Darrieux is"
        assert (record.request.target_new, record.request.target_true) == ("English", "French")
        assert record.paraphrase_prompts == ("Danielle Darrieux was born to speak",)
        assert record.neighborhood[0] == ("The mother tongue of Jean Gabin is", None)
        assert (record.relation_id, record.target_new_id) == ("P103", "Q1860")
        assert record.generation_prompts == ("Danielle Darrieux was born in",)


def test_zsre(tmp_path):
    (record,) = load_records("zsre", write(tmp_path, "zsre", [ZSRE]))
    assert record.kind == "zsre"
    assert record.request.prompt == "What is the Important feature of {}?"  # not inside "Important"
    assert (record.request.target_new, record.request.target_true) == ("six legs", None)
    assert record.paraphrase_prompts == ("What about Ant?",)
    assert record.neighborhood == (("nq question: who sang it?", "Nobody"),)


def test_limit(tmp_path):
    write(tmp_path, "mcf", [changed(COUNTERFACT, ["case_id"], i) for i in range(5)])
    assert [r.case_id for r in load_records("mcf", tmp_path, 2)] == [0, 1]
    assert len(load_records("mcf", tmp_path, 100)) == 5
    with pytest.raises(SphereError, match="at least 1"):
        load_records("mcf", tmp_path, 0)


def test_starter_is_found_beside_the_package(tmp_path):
    assert load_records("starter", tmp_path, 3) == load_records("starter", shipped("data"), 3)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["case_id"], ..., "'case_id' is missing"),
        (["case_id"], "7", "'case_id' should be a whole number, got '7'"),
        (["requested_rewrite"], ..., "'requested_rewrite' is missing"),
        (["requested_rewrite"], [], "'requested_rewrite' should be one object"),
        (["requested_rewrite", "subject"], ..., "'subject' is missing"),
        (["requested_rewrite", "subject"], " ", "'subject' is blank"),
        (["requested_rewrite", "prompt"], "The mother tongue is", "'prompt' has no '{}'"),
        (["requested_rewrite", "prompt"], "{} and {} are", "once as '{}'"),
        (["requested_rewrite", "target_new", "str"], None, "'target_new.str' should be a text"),
        (["requested_rewrite", "target_new", "str"], "", "'target_new.str' is blank"),
        (["requested_rewrite", "target_true"], ..., "'target_true' is missing"),
        (["requested_rewrite", "target_true", "str"], " ", "'target_true.str' is blank"),
        (["requested_rewrite", "target_true", "str"], " English\n", "are the same text, 'English'"),
        (["requested_rewrite", "target_new", "str"], "  French", "are the same text, 'French'"),
        (
            ["requested_rewrite", "target_new", "str"],
            "a\ud800",
            "'target_new.str' holds half of a surrogate pair",
        ),
        (["requested_rewrite", "target_new", "id"], 5, "'target_new.id' should be a text"),
        (["requested_rewrite", "relation_id"], ["P1"], "'relation_id' should be a text"),
        (["requested_rewrite", "prompt"], "{} \udfff", "'prompt' holds half of a surrogate pair, U+DFFF at"),
        (["requested_rewrite", "subject"], "\udc80", "'subject' holds half of a surrogate pair"),
        (["paraphrase_prompts"], ["a", "b\ud83d"], "'paraphrase_prompts'[1] holds half of a surrogate pair"),
        (["neighborhood_prompts"], ["\ude00 is"], "'neighborhood_prompts'[0] holds half of a surrogate pair"),
        (["attribute_prompts"], ["\ude00 is"], "'attribute_prompts'[0] holds half of a surrogate pair"),
        (["generation_prompts"], ["\ude00 is"], "'generation_prompts'[0] holds half of a surrogate pair"),
        (["generation_prompts"], ["\n"], "'generation_prompts' should be a list of non-empty texts"),
        (["paraphrase_prompts"], "text", "'paraphrase_prompts' should be a list"),
        (["neighborhood_prompts"], [1], "'neighborhood_prompts' should be a list of non-empty texts"),
    ],
)
def test_bad_counterfact_record(tmp_path, path, value, message):
    write(tmp_path, "mcf", [changed(COUNTERFACT, ["case_id"], 0), changed(COUNTERFACT, path, value)])
    with pytest.raises(SphereError) as error:
        load_records("mcf", tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"Record 1 of {tmp_path / 'multi_counterfact.json'} cannot be used")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("subject", "Bee", "its subject 'Bee' is not in 'src'"),
        ("answers", [], "'answers' should be a list"),
        ("answers", [" "], "'answers' should be a list of non-empty texts"),
        ("answers", ["six \ud800"], "'answers'[0] holds half of a surrogate pair"),
        ("src", "What is the Ant? \udc00", "'src' holds half of a surrogate pair"),
        ("subject", " ", "'subject' is blank"),
        ("rephrase", "\t", "'rephrase' is blank"),
        ("rephrase", "\ud800?", "'rephrase' holds half of a surrogate pair"),
        ("loc_ans", "", "'loc_ans' is blank"),
        ("loc_ans", "\ud800", "'loc_ans' holds half of a surrogate pair"),
        ("loc", "nq question: \ud800", "'loc' holds half of a surrogate pair"),
        ("loc", "who sang it", "'loc' should begin with"),
        ("loc_ans", ..., "'loc_ans' is missing"),
    ],
)
def test_bad_zsre_record(tmp_path, key, value, message):
    write(tmp_path, "zsre", [ZSRE, changed(ZSRE, [key], value)])
    with pytest.raises(SphereError, match=r"Record 1 of .*zsre_mend_eval.json") as error:
        load_records("zsre", tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        (("{} is", "Ann", "Rome", " "), "'target_true' of case 3 is blank"),
        (("{} is", "Ann", " New  York", "New York "), "of case 3 are the same text, 'New  York'"),
        (("{} is", "Ann", "\ud800", None), "'target_new' of case 3 holds half of a surrogate pair"),
    ],
)
def test_a_request_made_by_hand_is_checked_too(fields, message):
    with pytest.raises(SphereError) as error:
        EditRequest(3, *fields)
    assert message in str(error.value)


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    entry = changed(COUNTERFACT, ["requested_rewrite", "target_new", "str"], "\U0001f600")
    assert "\\ud83d\\ude00" in (write(tmp_path, "cf", [entry]) / "counterfact.json").read_text()
    assert load_records("cf", tmp_path)[0].request.target_new == "\U0001f600"


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "not valid JSON"),
        ("{}", "not a list of records"),
        ("[]", "not a list of records"),
        ("[3]", "Record 0 of"),
    ],
)
def test_bad_file(tmp_path, content, message):
    (tmp_path / "counterfact.json").write_text(content)
    with pytest.raises(SphereError, match=message):
        load_records("cf", tmp_path)


def test_repeated_case_ids(tmp_path):
    write(tmp_path, "cf", [COUNTERFACT, COUNTERFACT])
    with pytest.raises(SphereError, match=r"Records 0 and 1 of .* share the case_id 7"):
        load_records("cf", tmp_path)


def test_unknown_dataset():
    with pytest.raises(SphereError, match="Unknown dataset 'x': use one of starter, facts_zh, cf, mcf, zsre"):
        load_records("x")


class Response(io.BytesIO):
    def __init__(self, content, length):
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(length)


def test_download(tmp_path, monkeypatch):
    content = json.dumps([COUNTERFACT]).encode()
    urls = []

    def urlopen(url, timeout):
        urls.append(url)
        return Response(content, len(content))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):  # the second time the file is there
        assert load_records("mcf", tmp_path / "new")[0].case_id == 7
    assert urls == ["https://memit.baulab.info/data/dsets/multi_counterfact.json"]


@pytest.mark.parametrize("broken", [False, True])
def test_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch, broken):
    def urlopen(url, timeout):
        if broken:
            return Response(b"[", 1000)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(SphereError) as error:
        load_records("zsre", tmp_path)
    message = str(error.value)
    assert "put the published file at" in message
    assert str(tmp_path / "zsre_mend_eval.json") in message
    assert error.value.arguments == ("data_dir",)
    assert ("1 of 1000 bytes" if broken else "no network") in message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not SHARED.is_dir(), reason="no development data beside the project (../shared/data)")
@pytest.mark.parametrize("ds_name, count", [("cf", 3985), ("mcf", 3985), ("zsre", 500)])
def test_real_records(ds_name, count):
    records = load_records(ds_name, SHARED)
    assert len(records) == count
    assert all(r.paraphrase_prompts and r.neighborhood for r in records)
    assert all(r.request.subject in r.request.text for r in records)
