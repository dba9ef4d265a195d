"""Greedy text after rewrite prompts, beside the model's own generate; the first so many facts; chosen checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from task_data import write_task_data
from test_evaluate_run import NAMES, changed, counterfact, make_run, tiny_model, tiny_tokenizer
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from sphere.checkpoints import Checkpoint, chosen_checkpoints
from sphere.commands.score import parser
from sphere.data.records import Record
from sphere.downstream import run_downstream
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.exact_match import ExactMatch
from sphere.evaluation.scoring import RecordScorer
from sphere.evaluation.summary import format_table
from sphere.forward.passes import PassOptions
from sphere.requests import EditRequest


def fact(case_id: int, prompt: str, subject: str, target: str) -> Record:
    return Record(case_id, EditRequest(case_id, prompt, subject, target, "Oslo"))


FACTS = [
    fact(0, "{} is in", "Ann", "Rome"),
    fact(1, "The home of {}, of all places, is", "Bo Lee", "Saint Petersburg"),
    fact(2, "{}:", "X", "A"),
]


def plain_text(model, tokenizer, record: Record) -> str:
    """One prompt alone, by the model's own generate."""
    ids = tokenizer(record.request.text, return_tensors="pt")
    new = len(tokenizer(" " + record.request.target_new)["input_ids"])
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    whole = model.generate(**ids, do_sample=False, max_new_tokens=new)[0]
    return tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("tokens", [None, 8], ids=["one batch", "one by one"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_batch_equals_the_models_own_generate(make, tokens, tiny_tokenizer):
    model = make(3)
    found = ExactMatch(model, tiny_tokenizer, FACTS, 3, PassOptions(batch_tokens=tokens)).generate(FACTS)
    assert [case["text"] for case in found] == [plain_text(model, tiny_tokenizer, fact) for fact in FACTS]
    assert not any(case["exact_match"] for case in found)


def test_prompts_that_do_not_fit_together(tiny_tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=42)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    facts = [fact(0, "{} is in", "A" * 30, "Rome"), fact(1, "{} is in", "A", "Saint Petersburg")]
    found = ExactMatch(model, tiny_tokenizer, facts, 2).generate(facts)
    assert [case["text"] for case in found] == [plain_text(model, tiny_tokenizer, fact) for fact in facts]


def test_what_a_model_has_learnt_is_an_exact_match(tiny_tokenizer):
    model = tiny_llama().requires_grad_(True)
    ids = tiny_tokenizer("Ann is in Rome", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    facts = [
        fact(0, "{} is in", "Ann", " Rome"),
        fact(1, "{} is in", "Ann", "Bonn"),
        fact(2, "{} is", "Ann", "in"),
    ]
    found = ExactMatch(model, tiny_tokenizer, facts, 3).generate(facts)
    assert [case["exact_match"] for case in found] == [True, False, True]
    assert found[0]["text"] == found[1]["text"] == " Rome"


# ---- a run ----


@pytest.fixture
def setting(tmp_path):
    model = tiny_model()
    make_run(tmp_path, model)
    return model, tiny_tokenizer(), tmp_path


def evaluate(setting, count, **options):
    return evaluate_run(*setting, counterfact(9), exact_match_facts=count, progress=False, **options)


def test_the_first_facts_of_a_run_have_it_and_are_not_generated_again(setting, monkeypatch):
    without = evaluate(setting, 0)
    assert "exact_match" not in without["checkpoints"][1]["metrics"]
    scored, generated = [], []
    score, generate = RecordScorer.score, ExactMatch.generate
    monkeypatch.setattr(RecordScorer, "score", lambda s, r, p=True: scored.append(r) or score(s, r, p))
    monkeypatch.setattr(
        ExactMatch, "generate", lambda s, r: generated.extend(x.case_id for x in r) or generate(s, r)
    )
    summary = evaluate(setting, 6)
    assert summary["exact_match_facts"] == 6
    assert summary["notes"]["exact_match"] == "the first 6 of 9 cases"
    assert [row["metrics"]["exact_match"]["n"] for row in summary["checkpoints"]] == [6, 4, 6]
    assert "exact match" in format_table(summary)
    assert (scored, len(generated)) == ([], 16)
    assert evaluate(setting, 6) == summary
    assert len(generated) == 16
    assert evaluate(setting, 8)["checkpoints"][2]["metrics"]["exact_match"]["n"] == 8
    assert evaluate(setting, 0)["checkpoints"] == without["checkpoints"]  # text on disk is not counted
    lines = (setting[2] / "summary" / "cases_edit_9.jsonl").read_text().splitlines()[1:]
    found = [json.loads(line) for line in lines]
    assert ["greedy" in line["case"] for line in found[:9]] == [False] * 9
    assert ["greedy" in line["spare"] for line in found[9:]] == [True] * 8


def test_another_target_is_generated_again(setting):
    maker = ExactMatch(*setting[:2], counterfact(2), 1)
    first, second = counterfact(2)
    assert (maker.wants(first), maker.wants(second)) == (True, False)
    other = replace(first, request=replace(first.request, target_new="Bonn"))
    assert maker.settings(first) != maker.settings(other)


def test_chosen_checkpoints_are_scored_alone(setting, tmp_path):
    whole = evaluate(setting, 0)["checkpoints"]
    assert evaluate(setting, 0, only=[9])["checkpoints"] == [whole[0], whole[2]]
    assert evaluate(setting, 0)["checkpoints"] == whole


def test_downstream_tasks_of_chosen_states(setting):
    model, tokenizer, folder = setting
    model.config.max_position_embeddings = 2048  # the prompts are long in bytes
    data = write_task_data(folder / "data")
    options = {"num_tests": 2, "tasks": ["nli"]}
    found = run_downstream(model, tokenizer, folder, data, only=[9], **options)
    assert list(found["checkpoints"]) == ["edit_9"]
    again = run_downstream(model, tokenizer, folder, data, only=[0, 4], **options)
    assert list(again["checkpoints"]) == ["edit_9", "edit_0", "edit_4"]
    assert again["checkpoints"]["edit_9"] == found["checkpoints"]["edit_9"]


def test_checkpoints_are_chosen_by_number_or_as_the_last():
    there = [Checkpoint(Path(f"edit_{n}"), n) for n in (0, 100, 300)]
    assert chosen_checkpoints(there, "last") == [300]
    assert chosen_checkpoints(there, "0, 100,last") == [0, 100, 300]
    assert chosen_checkpoints(there[1:], "0") == [0]  # the unedited model needs no file
    for bad in ("200", "first", ""):
        with pytest.raises(SphereError, match="name some of 0, 100, 300, or last") as error:
            chosen_checkpoints(there, bad)
        assert error.value.arguments == ("only_checkpoints",)
    flags = parser().parse_args(["--weight_folder=x", "--only_checkpoints=0,last", "--exact_match_facts=100"])
    assert (flags.only_checkpoints, flags.exact_match_facts) == ("0,last", 100)


def test_states_differ_in_what_they_write(setting):
    """The model that generates is the one in that state."""
    facts = counterfact(9)
    evaluate(setting, 9)
    texts = []
    for n in (0, 9):
        lines = (setting[2] / "summary" / f"cases_edit_{n}.jsonl").read_text().splitlines()[1:]
        texts.append([json.loads(line)["case"]["greedy"]["text"] for line in lines])
    model = setting[0]
    weights = changed(model, 0.05 * 9)
    for name in NAMES:
        model.get_parameter(name).data.copy_(weights[name])
    assert texts[1] == [case["text"] for case in ExactMatch(*setting[:2], facts, 9).generate(facts)]
    assert texts[0] != texts[1]
