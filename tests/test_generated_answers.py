"""Greedy answers to a stop, beside the model's own generate; what they are measured by; a judge's program."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from test_evaluate_run import counterfact, make_run, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from sphere.commands.common import answer_options
from sphere.commands.score import parser
from sphere.data.formats import Probe, Question
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation.answer_metrics import AnswerOptions, compare_answers, measured
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.further_tables import format_summary
from sphere.evaluation.generated_answers import MAX_TOKENS, GeneratedAnswers, answer_in
from sphere.evaluation.judge import Judge
from sphere.evaluation.scoring import RecordScorer, compare_predictions
from sphere.evaluation.summary import summarise
from sphere.forward.passes import PassOptions
from sphere.requests import EditRequest


def fact(case_id: int, prompt: str, subject: str, target: str, *probes: Probe) -> Record:
    return Record(case_id, EditRequest(case_id, prompt, subject, target, "Oslo"), probes=probes)


FACTS = [
    fact(0, "{} is in", "Ann", "Rome"),
    fact(1, "The home of {} is", "Bo Lee", "Bonn"),
    fact(2, "{}:", "X", "A"),
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" English. She was born", "English"),
        ("\n\nEnglish\nFrench", "English"),
        (" St. Petersburg, in 3.5 hours. Then", "St. Petersburg, in 3.5 hours"),
        (" J. R. Smith", "J. R. Smith"),
        ("英语。他", "英语"),
        ("", ""),
    ],
)
def test_an_answer_is_the_first_line_or_sentence(text, answer):
    assert answer_in(text) == answer


@pytest.mark.parametrize(
    ("text", "targets", "expected"),
    [
        ("the English", ["English"], (True, True, 1)),
        ("English language", ["English"], (False, True, 2 / 3)),
        ("Englishman", ["English"], (False, False, 0)),
        ("Kristiania", ["Oslo", "Kristiania"], (True, True, 1)),
        ("他说英语", ["英语"], (False, True, 2 / 3)),
        ("", ["English"], (False, False, 0)),
    ],
)
def test_measures_of_an_answer(text, targets, expected):
    found = measured(text, targets)
    assert (found["exact_match"], found["containment"], found["f1"]) == pytest.approx(expected)


def plain_answer(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    whole = model.generate(**ids, do_sample=False, max_new_tokens=MAX_TOKENS)[0]
    return answer_in(tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("tokens", [None, 8], ids=["one batch", "one by one"])
def test_a_batch_equals_the_models_own_generate(tokens, tiny_tokenizer):
    model = tiny_llama(3)
    maker = GeneratedAnswers(model, tiny_tokenizer, FACTS, AnswerOptions(3), PassOptions(batch_tokens=tokens))
    found = [case["entries"][0]["text"] for case in maker.generate(FACTS)]
    assert found == [plain_answer(model, tiny_tokenizer, record.request.text) for record in FACTS]


def taught(tokenizer, *texts: str):
    """A model that says these texts."""
    model = tiny_llama().requires_grad_(True)
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sum(model(ids, labels=ids).loss for ids in rows).backward()
        optimizer.step()
    return model.requires_grad_(False)


def test_what_is_said_and_what_is_only_scored(tiny_tokenizer):
    model = taught(tiny_tokenizer, "Ann is in Rome\nAnn", "Where? In Rome\nAnn")
    right, other = Question("Where? In", ("Roma", "Rome")), Question("Ann is in", ("Bonn",))
    probes = (
        Probe("any", (other, right)),
        Probe("all", (other, right), every=True),
        Probe("kept", (Question("Ann is", ()),)),
    )
    record = fact(0, "{} is in", "Ann", "Rome", *probes)
    maker = GeneratedAnswers(model, tiny_tokenizer, [record], AnswerOptions(1))
    (case,) = RecordScorer(model, tiny_tokenizer).score([record], progress=False)
    case["answers"] = maker.generate([record])[0]
    before = json.loads(json.dumps(case))
    before["answers"]["entries"][-1]["text"] = "elsewhere"
    same = json.loads(json.dumps(case))
    compare_predictions([case], [same])
    found = summarise([case])
    means = {
        name: found[f"generated_exact_match_{name}"]["mean"] for name in ("rewrite", "any", "all", "kept")
    }
    assert means == {"rewrite": 100, "any": 100, "all": 0, "kept": 100}
    compare_answers(case, before)
    assert summarise([case])["generated_exact_match_kept"]["mean"] == 0


# ---- a run ----


@pytest.fixture
def setting(tmp_path):
    model = tiny_model()
    make_run(tmp_path, model)
    return model, tiny_tokenizer(), tmp_path


def evaluate(setting, count, judge=None):
    return evaluate_run(*setting, counterfact(9), answers=AnswerOptions(count, judge, 60), progress=False)


def program(*lines: str) -> str:
    """The command of a judge that does this with each line that it reads."""
    body = "\n".join(["import json, sys", "for line in sys.stdin:", *(f"    {line}" for line in lines)])
    return shlex.join([sys.executable, "-c", body])


def test_answers_of_the_first_facts_are_judged_kept_and_not_generated_again(setting, monkeypatch):
    asked = []
    generate = GeneratedAnswers.generate
    monkeypatch.setattr(
        GeneratedAnswers, "generate", lambda s, r: asked.extend(x.case_id for x in r) or generate(s, r)
    )
    without = evaluate(setting, 0)
    assert not [key for key in without["checkpoints"][1]["metrics"] if key.startswith("generated")]
    judge = program("one = json.loads(line)", "print(0.25 if one['targets'] == ['Rome'] else 0, flush=True)")
    summary = evaluate(setting, 6, judge)
    assert (summary["generated_facts"], summary["judge"]) == (6, judge)
    assert summary["notes"]["generated"] == "the first 6 of 9 cases, greedy, to a stop"
    for row, n in zip(summary["checkpoints"], (6, 4, 6), strict=True):
        for part in ("rewrite", "paraphrase"):
            assert row["metrics"][f"generated_judged_{part}"]["mean"] == 25
            assert row["metrics"][f"generated_f1_{part}"]["n"] == n
    assert "generated: exact match" in format_summary(summary)
    assert len(asked) == 16
    assert evaluate(setting, 6, judge) == summary
    assert len(asked) == 16


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sys.exit(3)"], r"ended \(exit code 3\) before it answered"),
        (["print('maybe', flush=True)"], "said 'maybe', which is no verdict"),
        (["print(7, flush=True)"], "said '7', which is no verdict"),
    ],
)
def test_a_judge_that_fails(lines, message):
    judge = Judge(program(*lines), 60)
    with pytest.raises(SphereError, match=message):
        judge({"prompt": "Ann is in", "answer": "Rome", "targets": ["Rome"]})
    judge.close()


def test_a_judge_that_says_nothing_is_not_waited_for_without_end():
    judge = Judge(program("pass"), 0.2)
    with pytest.raises(SphereError, match=r"said nothing within 0.2 s") as error:
        judge({"prompt": "Ann is in", "answer": "Rome", "targets": ["Rome"]})
    assert error.value.arguments == ("judge_seconds",)


@pytest.mark.parametrize("command", ["no_such_program_of_anyone", "'unclosed", ""])
def test_a_judge_that_cannot_be_started(command):
    with pytest.raises(SphereError, match="cannot be started"):
        Judge(command, 1)({"prompt": ""})


def test_flags():
    options = answer_options(
        parser().parse_args(["--weight_folder=x", "--generated_facts=20", "--judge=cat"])
    )
    assert options == AnswerOptions(20, "cat", 120)
    for wrong in (["--judge=cat"], ["--generated_facts=2", "--judge_seconds=0"]):
        with pytest.raises(SphereError, match="give"):
            answer_options(parser().parse_args(["--weight_folder=x", *wrong]))


def test_another_target_or_another_test_is_asked_again(setting):
    maker = GeneratedAnswers(*setting[:2], counterfact(2), AnswerOptions(1))
    first, second = counterfact(2)
    assert (maker.wants(first), maker.wants(second)) == (True, False)
    other = replace(first, probes=(Probe("more", (Question("A", ("B",)),)),))
    assert maker.settings(first) != maker.settings(other)
