"""GLUE subsets and MMLU as AlphaEdit's evaluation has them, as tasks of lm-evaluation-harness over local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_llama
from task_data import NLI

from sphere.checkpoints import write_checkpoint
from sphere.downstream import format_downstream, glue, harness, run_downstream
from sphere.downstream.harness import Harness
from sphere.errors import SphereError

pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-extra.txt)")

ROWS = {
    "glue/sst2": [{"sentence": f"film {i} ", "label": i % 2} for i in range(4)],
    "glue/mrpc": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(4)],
    "glue/cola": [{"sentence": f"Go {i}.", "label": i % 2} for i in range(4)],
    "glue/rte": [{"sentence1": f"a {i}", "sentence2": f"b {i}.", "label": i % 2} for i in range(4)],
    "mmlu": [{"question": f"q {i}?", "choices": ["w", "x", "y", "z"], "answer": i} for i in range(4)],
}
# Prompt of the second row, its class, and the words of all classes.
ASKED = {
    "sst2": ("Review :film 1 \nSentiment :", 1, ["negative", "positive"]),
    "mrpc": (
        "Are the sentences paraphrases of each other.\nSentence 1: a 1\nSentence 2: b 1\nAnswer:",
        1,
        ["No", "Yes"],
    ),
    "cola": ("Is this sentence linguistically acceptable?\nSentence: Go 1.\nAnswer: ", 1, ["No", "Yes"]),
    "rte": ("a 1\nquestion: b 1. True or False?\nanswer:", 1, ["True", "False"]),
    "nli": ('He said "1. entails the He spoke. True or False? Answer:', 1, ["False", "True"]),
    "mmlu": ("Question: q 1?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer:", 1, ["A", "B", "C", "D"]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """The files of all tasks."""
    folder = tmp_path / "data" / "task-data"
    (folder / "glue").mkdir(parents=True)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test-NLI.tsv").write_text(NLI)
    return tmp_path / "data"


def test_prompts_and_answers_are_those_of_the_evaluation(data_dir, tmp_path):
    from lm_eval.tasks import TaskManager

    harness.render(harness.local_tasks(data_dir), data_dir, tmp_path / "yaml")
    manager = TaskManager(include_path=str(tmp_path / "yaml"), include_defaults=False)
    loaded = manager.load([f"alphaedit_{name}{form}" for name in ASKED for form in ("", "_choice")])["tasks"]
    for name, (prompt, gold, words) in ASKED.items():
        generated, choice = loaded[f"alphaedit_{name}"], loaded[f"alphaedit_{name}_choice"]
        for task in (generated, choice):
            row = list(task.test_docs())[1]
            assert task.doc_to_text(row) == prompt
            assert int(task.doc_to_target(row)) == gold
        assert choice.doc_to_choice(row) == words
        ends = "\n" if name == "mmlu" else ""
        right = generated.process_results(row, [f" {words[gold]}{ends}"])
        assert right == {"acc": 1.0, "f1": (gold, gold), "invalid": 0.0}
        assert generated.process_results(row, ["?"]) == {
            "acc": 0.0,
            "f1": (gold, glue.INVALID),
            "invalid": 1.0,
        }


def test_the_first_word_that_occurs_is_the_answer():
    assert glue.sst2({"label": 0}, ["Positively negative"])["f1"] == (0, 1)
    assert glue.rte({"label": 0}, ["true, not false"])["f1"] == (0, 1)  # in their order
    assert glue.nli({"label": "not_entailment"}, ["false or true"])["f1"] == (0, 1)
    assert glue.cola({"label": 0}, ["I know"])["f1"] == (0, 0)
    assert glue.mmlu({"answer": 2}, [" C\nD\n"])["f1"] == (2, 2)
    assert glue.mmlu({"answer": 2}, [" C"])["invalid"] == 1
    assert glue.count([1.0, 0.0, 1.0]) == 2


def test_their_scores_are_in_the_table(data_dir, tmp_path, tiny_tokenizer):
    model = tiny_llama()
    name = "model.layers.1.mlp.down_proj.weight"
    write_checkpoint(tmp_path / "run", 0, {name: model.get_parameter(name).detach()})
    tasks = ["alphaedit_rte", "alphaedit_mmlu_choice"]
    summary = run_downstream(model, tiny_tokenizer, tmp_path / "run", data_dir, 4, ["nli"], tasks)
    rte, mmlu = (summary["checkpoints"]["edit_0"]["lm_eval"][task] for task in tasks)
    assert rte["invalid"] <= rte["n"] == 4
    assert {"acc", "f1"} <= mmlu.keys()
    lines = [line.split() for line in format_downstream(summary).splitlines()]
    (line,) = (line for line in lines if line[0] == "alphaedit_rte")
    assert line[1:] == [
        "unedited",
        "4",
        f"{100 * rte['acc']:.1f}",
        f"{100 * rte['f1']:.1f}",
        f"{rte['invalid']:.0f}",
    ]


def test_missing_data_is_named(tmp_path):
    with pytest.raises(SphereError, match=r"No task data at .*glue/sst2\.jsonl, which alphaedit_sst2 reads"):
        Harness(["alphaedit_sst2"], tmp_path)
