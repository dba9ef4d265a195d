"""The downstream tasks in the form of the paper's authors, and the table that the command ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from sklearn.metrics import f1_score
from task_data import write_task_data

from sphere.checkpoints import write_checkpoint
from sphere.commands import score
from sphere.downstream import PUBLISHED, TASKS, format_downstream, run_downstream, runner
from sphere.downstream.likelihoods import answer_likelihoods
from sphere.downstream.metrics import published_metrics, weighted_f1
from sphere.downstream.table import downstream_lines
from sphere.errors import SphereError
from sphere.forward.scorer import PackedScorer

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return write_task_data(tmp_path / "data")


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with the unedited weights and one checkpoint of the tiny model."""
    weight = tiny_llama().get_parameter(NAME).detach()
    for n_edits, change in ((0, 0.0), (5, 3.0)):
        write_checkpoint(tmp_path / "run", n_edits, {NAME: weight + change * torch.randn_like(weight)})
    return tmp_path / "run"


def test_prompts_are_the_authors_own(data_dir):
    prompts = {name: task.examples(data_dir, 2)[1].prompt for name, task in PUBLISHED.items()}
    assert prompts == {
        "reasoning": "Q: What is 2 plus 2? A:Let's think step by step. 2 + 2 = <<2+2=4>>4\n Therefore, the answer "
        "(arabic numerals) is:",
        "nli": 'He said "1. entails He spoke.. True or False? answer:',
        "open_domain_qa": "Refer to the passage below and answer the following question.\nPassage: \n\nIt is Mr  1."
        "\nQuestion: who is 1?\nAnswer:",
        "closed_domain_qa": "Please answer the given question based on the passage. The answer should be exact 'yes' "
        "or 'no'. passage: 1 is a\nnumber. question: is 1 even. answer: ",
    }
    assert [task.max_new_tokens for task in PUBLISHED.values()] == [5, 1, 20, 1]
    assert {task.name for task in PUBLISHED.values()}.isdisjoint(task.name for task in TASKS.values())


@pytest.mark.parametrize(
    "name, output, answers, prediction, correct",
    [
        ("reasoning", " about 1180", ("18",), "about 1180", True),  # contained, whatever stands around it
        ("reasoning", " 1800", ("1,800",), "1800", False),
        ("nli", " FALSEHOOD", ("false",), "false", True),
        ("nli", " false, not true", ("false",), "true", False),
        ("nli", " maybe", ("true",), None, False),
        ("closed_domain_qa", "Nothing", ("no",), "no", True),
        ("closed_domain_qa", "?", ("no",), None, False),
        ("open_domain_qa", "It was the Mr. Bean!\nNo", ("mr bean",), "It was the Mr. Bean!\nNo", True),
        ("open_domain_qa", "beans", ("bean",), "beans", False),
    ],
)
def test_outputs_are_graded_as_the_authors_do(name, output, answers, prediction, correct):
    assert PUBLISHED[name].grade(output, answers) == {"prediction": prediction, "correct": correct}


def test_accuracy_with_and_without_invalid_outputs():
    gold = ["true", "true", "true", "false"]
    found = ["true", None, "false", "false"]
    likelier = ["true", "true", "true", "true"]
    records = [
        {"answers": [g], "prediction": p, "correct": g == p, "choice": c}
        for g, p, c in zip(gold, found, likelier, strict=True)
    ]
    result = published_metrics(records)
    assert (result["accuracy"], result["accuracy_of_valid"], result["unparsed"]) == (0.5, 2 / 3, 1)
    assert result["choice_accuracy"] == 0.75
    assert result["choice_f1"] == pytest.approx(3 / 4 * 6 / 7)
    filled = [p or "neither" for p in found]
    assert result["f1"] == pytest.approx(f1_score(gold, filled, average="weighted"))
    assert weighted_f1([(0, 0), (1, 1), (2, 0)]) == pytest.approx((2 / 3 + 1 + 0) / 3)
    none = published_metrics([{"answers": ["4"], "prediction": None, "correct": False}])
    assert none["accuracy_of_valid"] is None
    assert "f1" not in none
    assert published_metrics([]) == {"n": 0, "accuracy": None}


def test_likelihoods_are_those_of_the_words_after_the_prompt(tiny_tokenizer):
    model = tiny_llama()
    prompts, words = ["a b. answer:", "the question. answer: ", "x" * 300], ["yes", "no"]
    found = answer_likelihoods(PackedScorer(model), tiny_tokenizer, prompts, words)
    for prompt, values in zip(prompts, found, strict=True):
        for word, value in zip(words, values, strict=True):
            text = f"{prompt.rstrip()} {word}"
            ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])[:, -256:]  # what the model has room for
            with torch.no_grad():
                predicted = model(ids).logits[0].log_softmax(-1)
            tokens = len(word) + (not prompt.endswith(" "))  # bytes, the blank among them
            own = [predicted[i - 1, ids[0, i]] for i in range(ids.shape[1] - tokens, ids.shape[1])]
            assert value == pytest.approx(float(torch.stack(own).mean()), rel=1e-4)


def test_both_forms_stand_side_by_side_and_go_on(run, data_dir, tiny_tokenizer, monkeypatch):
    model = tiny_llama()
    run_downstream(model, tiny_tokenizer, run, data_dir, tasks=["nli"])
    given = model, tiny_tokenizer, run, data_dir, None, ["nli", "reasoning"]
    summary = run_downstream(*given, task_format="published")
    tasks = summary["checkpoints"]["edit_5"]["tasks"]
    assert list(tasks) == ["nli", "published_reasoning", "published_nli"]
    assert {"accuracy_of_valid", "f1", "choice_accuracy", "choice_f1"} <= tasks["published_nli"].keys()
    assert "choice_accuracy" not in tasks["published_reasoning"]
    lines = (run / "rect_eval" / "edit_5" / "published_nli.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    example = PUBLISHED["nli"].examples(data_dir)[0]
    expected = answer_likelihoods(
        PackedScorer(edited(run)), tiny_tokenizer, [example.prompt], ["True", "False"]
    )[0]
    assert [*records[0]["log_likelihoods"].values()] == pytest.approx(expected, rel=1e-4)
    assert records[0]["choice"] == ("true" if expected[0] > expected[1] else "false")

    def never(_model, _tokenizer, prompts, *_rest):
        assert prompts == []  # nothing is decoded again
        return iter(())

    monkeypatch.setattr(runner, "greedy_batches", never)
    assert run_downstream(*given, task_format="published") == summary
    with pytest.raises(
        SphereError, match="Unknown form of the downstream tasks 'own': use ours or published"
    ):
        run_downstream(*given, task_format="own")
    with pytest.raises(SphereError, match="Unknown downstream task 'nil'"):
        run_downstream(*given[:5], ["nil"], task_format="published")


def edited(run: Path):
    """The tiny model with the weights of the checkpoint."""
    from sphere.checkpoints import read_weights

    model = tiny_llama()
    model.get_parameter(NAME).data.copy_(read_weights(run / "edit_5.safetensors")[NAME])
    return model


def test_the_command_ends_with_the_table(run, data_dir, tiny_tokenizer, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--weight_folder", str(run), "--model_name", str(tmp_path / "model"), "--device", "cpu"]
    flags += ["--data_dir", str(data_dir), "--tasks", "nli"]
    assert score.main([*flags, "--task_format", "published"]) == 0
    out = capsys.readouterr().out
    assert "of valid" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("published_nli ")] == [
        ["published_nli", "unedited", "5"],
        ["published_nli", "edit_5", "5"],
    ]


def test_the_table_has_every_task_and_checkpoint():
    ours = {"n": 4, "accuracy": 0.5, "accuracy_interval": [0.15, 0.85], "unparsed": 1, "f1": 0.25, "mcc": 0.0}
    theirs = {**ours, "accuracy_of_valid": 2 / 3, "choice_accuracy": 0.75}
    harness = {"n": 9, "acc": 0.9, "f1": 0.8, "invalid": 2.0}
    summary = {
        "checkpoints": {
            "edit_10": {"n_edits": 10, "tasks": {"published_nli": theirs}},
            "edit_0": {"n_edits": 0, "tasks": {"nli": ours}, "lm_eval": {"glue_rte": harness}},
        }
    }
    head, *lines = downstream_lines(summary)
    assert head == ["task", "weights", "n", "accuracy (%)", "F1 (%)", "invalid", "of valid", "likelier"]
    assert lines == [
        ["nli", "unedited", "4", "50.0 [15.0, 85.0]", "25.0", "1", "-", "-"],
        ["published_nli", "edit_10", "4", "50.0 [15.0, 85.0]", "25.0", "1", "66.7", "75.0"],
        ["glue_rte", "unedited", "9", "90.0", "80.0", "2", "-", "-"],
    ]
    assert format_downstream({"checkpoints": {}}).startswith("task")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    if not (SHARED / "task-data").is_dir():
        pytest.skip("needs ../shared/data/task-data")
    examples = PUBLISHED[name].examples(SHARED, 200)
    assert len(examples) == 200
    for example in examples[:20]:
        assert PUBLISHED[name].grade(f" {example.answers[0]}", example.answers)["correct"]
