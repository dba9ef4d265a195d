"""Scoring a whole run: files, resuming after a kill, and the sentence for each wrong folder, model or dataset."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sphere.checkpoints import write_checkpoint, write_config
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation import evaluate_run as evaluation
from sphere.evaluation.case_file import CaseFile, read_cases
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.exact_match import ExactMatch
from sphere.evaluation.scored_facts import ScoredFacts
from sphere.evaluation.scoring import RecordScorer, score_records
from sphere.requests import EditRequest
from sphere.weights import EditedWeights

ROOT = Path(__file__).parents[1]
NAMES = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def tiny_tokenizer():
    """Byte-level, one token per byte."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_model(seed=0, hidden_size=16, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def counterfact(n):
    return [
        Record(
            10 + i,
            EditRequest(10 + i, "The home of {} is", f"person {i}", "Rome", "Oslo"),
            paraphrase_prompts=(f"person {i} lives in",),
            neighborhood=((f"The home of neighbor {i} is", None), (f"{i} came from", None)),
        )
        for i in range(n)
    ]


def zsre(n):
    return [
        Record(
            i,
            EditRequest(i, "Where is {}?", f"person {i}", "in Rome"),
            "zsre",
            paraphrase_prompts=(f"Where did person {i} go?",),
            neighborhood=((f"nq question: who is {i}?", "somebody"),),
        )
        for i in range(n)
    ]


def changed(model, scale, seed=1):
    """The edited weights with noise, as a checkpoint keeps them."""
    torch.manual_seed(seed)
    return {name: w + scale * torch.randn_like(w) for name, w in EditedWeights(model, NAMES).stored().items()}


def make_run(folder, model, steps=(4, 9), case_ids=range(10, 19), **config):
    for n in (0, *steps):
        write_checkpoint(folder, n, changed(model, 0.05 * n))
    write_config(folder, {"case_ids": list(case_ids), "alg_name": "test", **config})


@pytest.fixture
def setting(tmp_path):
    model = tiny_model()
    make_run(tmp_path, model)
    return model, tiny_tokenizer(), tmp_path


def evaluate(setting, records, **options):
    return evaluate_run(*setting, records, progress=False, **options)


def test_rows_are_the_scores_of_each_checkpoint_on_its_edits(setting):
    model, tokenizer, folder = setting
    before = EditedWeights(model, NAMES).stored()
    records = counterfact(12)[::-1]  # the order of editing is the run's, not the dataset's
    summary = evaluate(setting, records)
    assert json.loads((folder / "summary" / "summary.json").read_text()) == summary
    assert [(r["label"], r["n_edits"]) for r in summary["checkpoints"]] == [
        ("unedited", 0),
        ("edit_4", 4),
        ("edit_9", 9),
    ]
    assert [r["metrics"]["n_cases"] for r in summary["checkpoints"]] == [9, 4, 9]
    assert summary["checkpoints"][1]["unedited"]["n_cases"] == 4
    assert summary["checkpoints"][2]["unedited"] == summary["checkpoints"][0]["metrics"]
    assert set(summary["checkpoints"][2]["retention"]) == {"first", "middle", "last"}
    assert "case_ids" not in summary["run"]
    for name, weight in EditedWeights(model, NAMES).stored().items():
        assert torch.equal(weight, before[name])

    EditedWeights(model, NAMES).restore(changed(model, 0.05 * 4))
    expected = score_records(model, tokenizer, counterfact(4), progress=False)
    lines = (folder / "summary" / "cases_edit_4.jsonl").read_text().splitlines()
    found = [json.loads(line)["case"] for line in lines[1:]]
    assert [case["case_id"] for case in found] == [10, 11, 12, 13]
    for case, other in zip(found, expected, strict=True):
        assert case["rewrite"][0]["nll_new"] == pytest.approx(other["rewrite"][0]["nll_new"], abs=1e-5)
        assert case["rewrite"][0]["prompt"] == other["rewrite"][0]["prompt"]


def test_published_run_without_configuration(tmp_path):
    model = tiny_model()
    torch.save({"weight": changed(model, 0.1)}, tmp_path / "edit_3.pth")
    summary = evaluate((model, tiny_tokenizer(), tmp_path), counterfact(5))
    assert [r["metrics"]["n_cases"] for r in summary["checkpoints"]] == [3, 3]
    assert summary["checkpoints"][1]["checkpoint"] == "edit_3.pth"


def test_zsre_neighbors_against_the_unedited_prediction(tmp_path):
    model = tiny_model()
    make_run(tmp_path, model, steps=(6,), case_ids=range(6))
    unedited, edited = evaluate((model, tiny_tokenizer(), tmp_path), zsre(6))["checkpoints"]
    assert unedited["metrics"]["neighborhood_accuracy_unedited_prediction"]["mean"] == 100
    assert edited["metrics"]["neighborhood_accuracy_unedited_prediction"]["mean"] < 100


@pytest.fixture
def asked(monkeypatch):
    """The ids of the cases that are scored from now on."""
    found = []
    score = RecordScorer.score

    def counting(self, records, progress=True):
        found.extend(record.case_id for record in records)
        return score(self, records, progress)

    monkeypatch.setattr(RecordScorer, "score", counting)
    return found


def test_finished_cases_are_not_scored_again(setting, asked, monkeypatch):
    records = counterfact(9)
    summary = evaluate(setting, records)
    asked.clear()
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    assert evaluate(setting, records) == summary
    assert asked == []

    path = setting[2] / "summary" / "cases_edit_9.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # as a kill leaves it
    evaluate(setting, records)
    assert asked == [16, 17, 18]  # the chunk that is not whole

    asked.clear()  # another checkpoint under the same name
    write_checkpoint(setting[2], 4, changed(setting[0], 0.3, seed=5))
    evaluate(setting, records)
    assert asked == [10, 11, 12, 13]

    asked.clear()  # another record under the same id
    changed_record = Record(15, EditRequest(15, "{} is at", "x", "Rome", "Oslo"))
    evaluate(setting, [changed_record, *records[:5], *records[6:]])
    assert asked == [13, 14, 15] * 2


def test_runs_on_the_same_facts_share_the_unedited_models_cases(setting, asked, tmp_path):
    model, tokenizer, _ = setting
    records, shared = counterfact(9), tmp_path / "unedited"

    def run(name, **changes):
        make_run(tmp_path / name, model, steps=(4,), **changes)
        asked.clear()
        summary = evaluate((model, tokenizer, tmp_path / name), records, unedited_dir=shared)
        return summary["checkpoints"], list(asked)

    first, scored = run("first")
    assert scored == [10, 11, 12, 13] * 2
    second, scored = run("second")
    assert scored == [10, 11, 12, 13]  # of the edited model alone
    assert second == first
    _, scored = run("shuffled", case_ids=[13, 12, 11, 10])
    assert scored == [13, 12, 11, 10] * 2
    _, scored = run("in its turn", user_turn="Q: {} A:")
    assert scored == [10, 11, 12, 13] * 2
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(1.1)
    _, scored = run("another model")
    assert scored == [10, 11, 12, 13] * 2


def test_a_sample_of_the_facts(setting):
    folder, records = setting[2], counterfact(9)
    everything = evaluate(setting, records)["checkpoints"]
    scored = {n: read_cases(folder / "summary" / f"cases_edit_{n}.jsonl") for n in (4, 9)}
    summary = evaluate(setting, records, scored_facts=5)
    assert summary["scored_facts"] == 5
    sampled = {n: read_cases(folder / "summary" / f"cases_edit_{n}.jsonl") for n in (0, 4, 9)}
    ids = {n: [case["case_id"] for case in cases] for n, cases in sampled.items()}
    assert ids[4] == [10, 11, 12, 13]  # no more than 5: all
    assert len(ids[9]) == 5
    assert ids[9] == sorted(ids[9])
    assert set(ids[0]) == {*ids[4], *ids[9]}
    assert [row["unedited"]["n_cases"] for row in summary["checkpoints"]] == [len(ids[0]), 4, 5]
    whole = {case["case_id"]: case for case in scored[9]}
    assert sampled[9] == [whole[i] for i in ids[9]]
    assert summary["checkpoints"][1]["metrics"] == everything[1]["metrics"]
    assert evaluate(setting, records, scored_facts=9) == evaluate(setting, records) | {"scored_facts": 9}


def test_what_is_finished_stays_when_less_is_asked_for(setting, asked, monkeypatch):
    records, path = counterfact(9), setting[2] / "summary" / "cases_edit_9.jsonl"
    whole = evaluate(setting, records, exact_match_facts=4)
    made = read_cases(path)
    evaluate(setting, records)
    assert not any("greedy" in case for case in read_cases(path))
    evaluate(setting, records, scored_facts=5)
    assert len(read_cases(path)) == 5
    evaluate(setting, records, only=[4])
    (unedited,) = evaluate(setting, records, only=[0])["checkpoints"]
    assert unedited["metrics"]["score"] == whole["checkpoints"][0]["metrics"]["score"]
    assert unedited["metrics"]["n_cases"] == 9
    asked.clear()
    monkeypatch.setattr(ExactMatch, "generate", None)  # nothing is generated again
    assert evaluate(setting, records, exact_match_facts=4) == whole
    assert read_cases(path) == made
    assert asked == []


@given(n=st.integers(1, 40), limit=st.integers(1, 40), seed=st.integers(0, 3), data=st.data())
def test_a_fact_drawn_once_is_drawn_at_all_earlier_checkpoints(n, limit, seed, data):
    facts = ScoredFacts(counterfact(n), limit, seed)
    earlier = data.draw(st.integers(1, n))
    ids = {k: [record.case_id for record in facts.of(k)] for k in (earlier, n)}
    assert [len(its) for its in ids.values()] == [min(limit, k) for k in ids]
    assert {i for i in ids[n] if i < 10 + earlier} <= set(ids[earlier])


@pytest.mark.parametrize("text", [{"exact_match_facts": 1}, {"generation_interval": 2}])
def test_no_text_of_a_sample(setting, text):
    with pytest.raises(SphereError, match="leave out one of the two") as error:
        evaluate(setting, counterfact(9), scored_facts=5, **text)
    assert error.value.arguments == ("scored_facts",)
    with pytest.raises(SphereError, match="at least 0, got -1"):
        evaluate(setting, counterfact(9), scored_facts=-1)


def test_killed_and_restarted_gives_the_same_summary(tmp_path):
    """A process killed in the middle of the last checkpoint, then run again, beside one left alone."""
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import sphere.evaluation.evaluate_run as evaluation
        from test_evaluate_run import counterfact, tiny_model, tiny_tokenizer
        evaluation.CHUNK = 2
        def run(folder):
            evaluation.evaluate_run(tiny_model(), tiny_tokenizer(), folder, counterfact(9), progress=False)
        append, calls = evaluation.CaseFile.append, []
        def killing(self, records, cases):
            append(self, records, cases)
            calls.append(1)
            if len(calls) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
        child = os.fork()
        if not child:
            evaluation.CaseFile.append = killing
            run(sys.argv[1])
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert not os.path.exists(sys.argv[1] + "/summary/summary.json")
        run(sys.argv[1])
        run(sys.argv[2])
        """
    )
    first, second = tmp_path / "killed", tmp_path / "alone"
    make_run(first, tiny_model())
    shutil.copytree(first, second)
    command = [sys.executable, "-c", script, str(first), str(second)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((f / "summary" / "summary.json").read_text()) for f in (first, second)]
    for summary in summaries:
        del summary["folder"]
    assert summaries[0] == summaries[1]
    for name in ("cases_edit_0.jsonl", "cases_edit_4.jsonl", "cases_edit_9.jsonl"):
        assert (first / "summary" / name).read_bytes() == (second / "summary" / name).read_bytes()


def as_it_is(_record, case):
    return case


def test_case_file_keeps_what_is_not_counted(tmp_path):
    records, path = counterfact(3), tmp_path / "cases.jsonl"
    file = CaseFile(path, {"of": "a"})
    file.write([], as_it_is)
    file.append(records[:2], [{"case_id": 10, "text": "old"}, {"case_id": 11}])
    file.append(records[:1], [{"case_id": 10, "text": "new"}])
    assert read_cases(path) == [{"case_id": 10, "text": "new"}, {"case_id": 11}]
    file.write(records[:1], lambda _record, case: {"case_id": case["case_id"]})
    assert read_cases(path) == [{"case_id": 10}]
    again = CaseFile(path, {"of": "a"})
    assert [again.get(r) for r in records] == [{"case_id": 10, "text": "new"}, {"case_id": 11}, None]


def test_case_file_ignores_other_headers_and_torn_lines(tmp_path):
    records = counterfact(3)
    path = tmp_path / "cases.jsonl"
    file = CaseFile(path, {"of": "a"})
    file.write([], as_it_is)
    file.append(records[:2], [{"case_id": 10}, {"case_id": 11}])
    with path.open("a") as out:
        out.write('{"record": "')
    again = CaseFile(path, {"of": "a"})
    assert [again.get(r) for r in records] == [{"case_id": 10}, {"case_id": 11}, None]
    again.forget(records[:1])
    again.write(records, as_it_is)
    assert path.read_text().count("\n") == 2
    assert [again.get(r) for r in records] == [None, {"case_id": 11}, None]
    assert CaseFile(path, {"of": "b"}).get(records[0]) is None


def test_wrong_folder(tmp_path):
    setting = tiny_model(), tiny_tokenizer()
    with pytest.raises(SphereError, match="No folder"):
        evaluate((*setting, tmp_path / "none"), counterfact(3))
    with pytest.raises(SphereError, match="No checkpoints"):
        evaluate((*setting, tmp_path), counterfact(3))
    write_checkpoint(tmp_path, 0, changed(setting[0], 0))
    with pytest.raises(SphereError, match="no edits yet"):
        evaluate((*setting, tmp_path), counterfact(3))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"seed": 7}, "differs by .* before any edit"),
        ({"hidden_size": 32}, "has shape"),
        ({"layers": 1}, "has no weight 'model.layers.1.mlp.down_proj.weight'"),
    ],
)
def test_checkpoint_of_another_model(setting, other, message):
    with pytest.raises(SphereError, match=message) as error:
        evaluate((tiny_model(**other), *setting[1:]), counterfact(9))
    assert "is of another model" in str(error.value)
    assert error.value.arguments == ("model_name",)


def test_dataset_shorter_than_the_edits(setting):
    with pytest.raises(SphereError, match="made 9 edits, of which the dataset holds only 5") as error:
        evaluate(setting, counterfact(5))
    assert "dataset_size_limit" in error.value.arguments


def test_another_dataset(setting):
    write_config(setting[2], {"ds_name": "mcf"})
    with pytest.raises(SphereError, match="edited the dataset 'mcf', not 'cf'") as error:
        evaluate(setting, counterfact(9), ds_name="cf")
    assert error.value.arguments == ("ds_name",)


def test_same_model_in_less_precision(setting):
    model, tokenizer, folder = setting
    evaluate((model.to(torch.bfloat16), tokenizer, folder), counterfact(9))
