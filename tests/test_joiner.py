"""What stands between a prompt and its target, by the characters on both sides, and everywhere the same."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import LLAMA_MODULES, REQUESTS, tiny_hparams, tiny_llama
from tiny_run import method_values

from sphere import Editor, EditRequest, SphereError, hparams_from_dict
from sphere.data.records import Record, load_records
from sphere.evaluation.scoring import score_records
from sphere.methods import get_method
from sphere.values.compute_ks import ids_to_subject
from sphere.values.joiner import Continued, continuation, joiner
from sphere.values.tokenization import encode, encode_pair
from sphere.values.z_batches import prompts_of

WITH_BLANK = [
    ("The capital of France is", "Rome"),
    ("Who wrote it?", "Ann"),
    ("Q: Where is Oz? A:", "Rome"),
    ("In 1990,", "Ann"),
    ("the dogs'", "home"),
    ('They call it "Oz"', "there"),
    ("Oz (a land)", "is"),
    ("„Haus“", "heißt"),  # in German “ closes
    ("»Haus«", "heißt"),  # and « too, this way round
    ("The Chinese word for cat is", "猫"),
    ("대한민국의 수도는", "서울"),  # Korean has blanks
    ("القاهرة هي عاصمة", "مصر"),
    ("Столица России —", "Москва"),
    ("1 + 1 =", "2"),
    ("中国的首都:", "Paris"),
    ("[INST] Where? [/INST]", "Rome"),
    ("", "Rome"),
]
WITHOUT = [
    ("The capital of France is", " Rome"),
    ("The capital of France is ", "Rome"),
    ("The capital of France is\u00a0", "Rome"),
    ("<|im_start|>assistant\n", "Rome"),
    ('He said: "', "Rome"),
    ("He said: “", "Rome"),
    ("Sie sagte: „", "Rom"),
    ("Il dit : «", "Rome"),
    ('"', "Rome"),
    ("Oz (", "Rome"),
    ('Oz ("', "Rome"),
    ("中国的首都是", "纽约"),
    ("中国的首都是", "Rome"),
    ("他说“", "纽约"),
    ("他说：", "纽约"),
    ("中国的首都:", "纽约"),
    ("他出生于1990", "年"),
    ("日本の首都は", "パリ"),
    ("コーヒー", "です"),
    ("เมืองหลวงของไทยคือ", "ปารีส"),
    ("รักษ์", "ป่า"),  # ends in a mark above a letter
    ("他说「", "Rome"),
    ("ເມືອງຫຼວງແມ່ນ", "ປາຣີ"),
    ("រាជធានី", "ប៉ារីស"),
]


@pytest.mark.parametrize(("prompt", "target"), WITH_BLANK)
def test_a_blank_where_writing_and_end_want_one(prompt: str, target: str) -> None:
    assert joiner(prompt, target) == " "
    assert continuation(prompt, target) == f" {target}"


@pytest.mark.parametrize(("prompt", "target"), WITHOUT)
def test_nothing_elsewhere(prompt: str, target: str) -> None:
    assert joiner(prompt, target) == ""
    assert Continued(prompt, target).text == prompt + target


def test_a_given_joiner_overrides() -> None:
    assert Continued("Ann is", "Welsh", "").text == "Ann isWelsh"
    assert Continued("中国的首都是", "纽约", " ").text == "中国的首都是 纽约"


def test_a_request_without_one_is_written_as_ever() -> None:
    """What is digested of runs and of cases: the text of the dataclass, as it was before there was a joiner."""
    request = REQUESTS[0]
    assert repr(request) == (
        "EditRequest(case_id=0, prompt='The mother tongue of {} is', subject='Ann Lee', target_new='Welsh', "
        "target_true='Greek')"
    )
    assert repr(dataclasses.replace(request, joiner="")).endswith(", target_true='Greek', joiner='')")


def test_records_say_theirs(tmp_path) -> None:
    rewrite = {"prompt": "{} is", "subject": "Ann", "target_new": {"str": "b"}, "target_true": {"str": "c"}}
    record = {"requested_rewrite": rewrite, "paraphrase_prompts": ["Is Ann"], "neighborhood_prompts": []}
    path = tmp_path / "starter.json"
    path.write_text(json.dumps([{"case_id": 0, **record}, {"case_id": 1, "joiner": "", **record}]))
    assert [r.request.joiner for r in load_records("starter", tmp_path)] == [None, ""]
    path.write_text(json.dumps([{"case_id": 0, "joiner": 3, **record}]))
    with pytest.raises(SphereError, match="'joiner' should be a text"):
        load_records("starter", tmp_path)


# ---- the same everywhere ----


@pytest.mark.parametrize(("prompt", "given"), [("{} is", ""), ("{}是", None), ("So, {} is ", None)])
def test_z_keys_and_scores_read_the_same_text(tiny_tokenizer, prompt: str, given: str | None) -> None:
    request = EditRequest(0, prompt, "中国", "b", "c", given)
    text = request.text + "b"
    pairs = prompts_of(tiny_tokenizer, 0, request, ["{}", "So. {}"], kl=False, merge=False)
    assert [tiny_tokenizer.decode(p.ids) for p in pairs] == [text[:-1], "So. " + text[:-1]]
    assert [[label for _, label in p.scored] for p in pairs] == [encode(tiny_tokenizer, "b").ids] * 2
    assert tuple(pairs[0].ids[: pairs[0].lookup + 1]) == ids_to_subject(tiny_tokenizer, "{}", request)
    model = tiny_llama()
    case = score_records(model, tiny_tokenizer, [Record(0, request)], progress=False)[0]["rewrite"][0]
    ids, start = encode_pair(tiny_tokenizer, request.text, "b", "")
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert case["nll_new"] == pytest.approx(-float(logits[start - 1, ids[start]]), abs=1e-5)


@pytest.mark.parametrize("method", ["FT", "AlphaEdit"])
def test_the_edit_is_of_the_text_without_a_blank(tiny_tokenizer, method: str) -> None:
    """The same weights as for a prompt and a target that are cut elsewhere, but read the same."""

    def edited(request: EditRequest) -> dict[str, torch.Tensor]:
        hparams = (
            tiny_hparams(LLAMA_MODULES, v_num_grad_steps=2)
            if method == "AlphaEdit"
            else hparams_from_dict(method_values("FT"), get_method("FT").hparams_class)
        )
        templates = (("{}",), ("So. {}",))
        model = tiny_llama()
        editor = Editor(model, tiny_tokenizer, method, hparams, context_templates=templates, progress=False)
        editor.edit([request])
        return editor.final_weights()

    without, explicit = EditRequest(0, "{}是", "国", "ab"), EditRequest(0, "{}是", "国", "ab", joiner="")
    with_blank = edited(EditRequest(0, "{}是", "国", "ab", joiner=" "))
    for name, weight in edited(without).items():
        assert weight.equal(edited(explicit)[name])
        assert not weight.equal(with_blank[name])
