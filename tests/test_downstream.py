"""The four downstream tasks: prompts, grading, decoding, and a run that can be killed and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from task_data import write_task_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sphere.checkpoints import write_checkpoint
from sphere.downstream import TASKS, format_downstream, harness, metrics, run_downstream, runner
from sphere.downstream.decoding import greedy_batches
from sphere.downstream.harness import LOCAL_TASKS, Harness
from sphere.errors import SphereError
from sphere.evaluation import answer_match
from sphere.forward.passes import PassOptions

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def data_dir(tmp_path):
    return write_task_data(tmp_path / "data")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, one token per byte, padding on the right and no pad token: nothing may depend on either."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="\u0100")  # byte 0


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def checkpoint(folder, model, n_edits, change=0.0):
    torch.manual_seed(n_edits)
    weight = model.get_parameter(NAME)
    write_checkpoint(folder, n_edits, {NAME: weight + change * torch.randn_like(weight)})


# Metrics


@pytest.mark.parametrize(
    "text, number",
    [
        (" 18.", "18"),
        ("$70,000 a day", "70000"),
        ("-3.50", "-3.5"),
        ("none", None),
        ("", None),
        ("3.\n4", "3"),
    ],
)
def test_first_number(text, number):
    assert metrics.first_number(text) == number


def test_first_class():
    assert metrics.first_word_among(" False. True", ("true", "false")) == "false"
    assert metrics.first_word_among("Untrue", ("true", "false")) is None
    assert metrics.first_word_among("I know: no!", ("yes", "no")) == "no"


def test_answers():
    answers = ["The U.S. dollar", "dollar"]
    assert answer_match.normalise_answer("  The  U.S. Dollar! ") == "us dollar"
    assert answer_match.soft_exact_match("It was the US dollar, I think", answers)
    assert not answer_match.soft_exact_match("petrodollars", answers)
    assert not answer_match.soft_exact_match("anything", ["the", ""])  # nothing is left of these
    assert answer_match.exact_match("a Dollar.", answers)
    assert not answer_match.exact_match("one dollar", answers)
    assert answer_match.token_f1("one dollar", answers) == pytest.approx(2 / 3)
    assert metrics.first_line("\n\n yes \nno") == "yes"


@pytest.mark.parametrize(
    ("prediction", "answer", "equal", "contained", "f1"),
    [
        ("A", "A", True, True, 1.0),  # the label of a choice, no article
        ("a. Paris", "A", False, True, 2 / 3),
        ("B", "A", False, False, 0.0),
        ("", "A", False, False, 0.0),
        ("The", "A", False, False, 0.0),
        ("5 %", "%", False, True, 2 / 3),
        ("", "", True, True, 1.0),  # nothing said, as before
        ("Paris", "", False, False, 0.0),
    ],
)
def test_answers_of_which_nothing_else_is_left(prediction, answer, equal, contained, f1):
    assert answer_match.exact_match(prediction, [answer]) is equal
    assert answer_match.soft_exact_match(prediction, [answer]) is contained
    assert answer_match.token_f1(prediction, [answer]) == pytest.approx(f1)


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_exact_matches_are_soft_matches(prefix, answer):
    if answer_match.normalise_answer(answer):
        assert answer_match.exact_match(answer, [answer])
        assert answer_match.soft_exact_match(f"{prefix} {answer}", [answer])
        assert answer_match.token_f1(answer, [answer]) == pytest.approx(1)


def test_summary_counts_unparsed_as_wrong():
    gold = ["yes", "yes", "no", "no"]
    found = ["yes", None, "no", "yes"]
    records = [{"answers": [g], "prediction": p, "correct": g == p} for g, p in zip(gold, found, strict=True)]
    summary = metrics.task_metrics(records, "yes")
    assert (summary["n"], summary["accuracy"], summary["unparsed"]) == (4, 0.5, 1)
    assert summary["f1"] == pytest.approx(0.5)  # one hit, one miss, one false alarm
    assert summary["accuracy_interval"][0] < 0.5 < summary["accuracy_interval"][1]
    perfect = [{"answers": [g], "prediction": g, "correct": True} for g in gold]
    assert metrics.task_metrics(perfect, "yes")["mcc"] == pytest.approx(1)
    assert metrics.task_metrics([], "yes") == {"n": 0, "accuracy": None}


# Tasks


def test_prompts_show_the_question_and_hide_the_answer(data_dir):
    examples = {name: task.examples(data_dir, 2) for name, task in TASKS.items()}
    assert [len(found) for found in examples.values()] == [2] * 4
    reasoning = examples["reasoning"][0]
    assert "1 + 1 = 2" in reasoning.prompt
    assert "<<" not in reasoning.prompt
    assert "####" not in reasoning.prompt
    assert reasoning.answers == ("2",)
    assert 'He said "0.' in examples["nli"][0].prompt  # an unpaired quote is text
    assert [e.answers for e in examples["nli"]] == [("false",), ("true",)]
    assert "Passage: It is Mr 0.\n" in examples["open_domain_qa"][0].prompt
    assert [e.answers for e in examples["closed_domain_qa"]] == [("yes",), ("no",)]
    assert all(e.prompt == e.prompt.strip() for found in examples.values() for e in found)


@pytest.mark.parametrize("name", TASKS)
def test_published_files_are_read(name):
    if not (SHARED / "task-data").is_dir():
        pytest.skip("needs ../shared/data/task-data")
    examples = TASKS[name].examples(SHARED)
    assert len(examples) > 200
    for example in examples[:20]:
        right = TASKS[name].grade(f" {example.answers[0]}.\nNo, yes, 7", example.answers)
        assert right["correct"], example


# Decoding


def test_batched_decoding_matches_one_by_one(model, tokenizer):
    prompts = ["a", "the longest of all prompts " * 3, "some words", "", "x y z"]
    prompts = [p or "." for p in prompts]
    batched = dict(
        pair
        for b in greedy_batches(model, tokenizer, prompts, 6, PassOptions(batch_tokens=150))
        for pair in b
    )
    assert sorted(batched) == list(range(5))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert batched[i] == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)


def test_prompts_beyond_the_context_lose_their_beginning(model, tokenizer):
    long = "".join(chr(97 + i % 26) for i in range(700))
    ((_, text),) = next(greedy_batches(model, tokenizer, [long], 4))
    ((_, same),) = next(greedy_batches(model, tokenizer, [long[-508:]], 4))
    assert text == same


# Runs


def test_every_checkpoint_is_scored_and_the_model_left_alone(tmp_path, model, tokenizer, data_dir):
    run = tmp_path / "run"
    for n_edits, change in ((0, 0.0), (10, 2.0), (20, 4.0)):
        checkpoint(run, model, n_edits, change)
    before = model.get_parameter(NAME).clone()
    summary = run_downstream(model, tokenizer, run, data_dir, num_tests=3)
    assert torch.equal(model.get_parameter(NAME), before)
    assert summary == json.loads((run / "rect_eval" / "summary.json").read_text("utf-8"))
    assert list(summary["checkpoints"]) == ["edit_0", "edit_10", "edit_20"]
    for name, entry in summary["checkpoints"].items():
        assert f"edit_{entry['n_edits']}" == name
        assert {task: scores["n"] for task, scores in entry["tasks"].items()} == dict.fromkeys(TASKS, 3)
        assert "mcc" in entry["tasks"]["nli"]
        assert "mcc" not in entry["tasks"]["reasoning"]
    outputs = {
        name: (run / "rect_eval" / name / "nli.jsonl").read_text("utf-8") for name in summary["checkpoints"]
    }
    assert len(set(outputs.values())) == 3  # each checkpoint its own outputs
    record = json.loads(outputs["edit_0"].split("\n")[0])
    assert set(record) >= {"index", "prompt", "answers", "output", "prediction", "correct"}


def test_a_run_without_its_original_weights_starts_from_the_model(tmp_path, model, tokenizer, data_dir):
    checkpoint(tmp_path / "run", model, 10, 2.0)
    summary = run_downstream(model, tokenizer, tmp_path / "run", data_dir, 2, ["nli"])
    assert list(summary["checkpoints"]) == ["edit_0", "edit_10"]


def test_resuming_decodes_only_what_is_missing(tmp_path, model, tokenizer, data_dir, monkeypatch):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for run in (straight, killed):
        checkpoint(run, model, 0)
        checkpoint(run, model, 10, 2.0)
    expected = run_downstream(model, tokenizer, straight, data_dir, passes=PassOptions(batch_tokens=300))

    real, decoded = runner.greedy_batches, []

    def counted(model, tokenizer, prompts, *rest, die_after=None):
        for batch in real(model, tokenizer, prompts, *rest):
            decoded.extend(batch)
            yield batch
            if die_after is not None and len(decoded) >= die_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(runner, "greedy_batches", lambda *a: counted(*a, die_after=13))
    with pytest.raises(KeyboardInterrupt):
        run_downstream(model, tokenizer, killed, data_dir, passes=PassOptions(batch_tokens=300))
    torn = killed / "rect_eval" / "edit_0" / "nli.jsonl"
    torn.write_text(torn.read_text("utf-8") + '{"index": 4, "pro', "utf-8")  # as another tool might leave it
    monkeypatch.setattr(runner, "greedy_batches", counted)
    assert (
        run_downstream(model, tokenizer, killed, data_dir, passes=PassOptions(batch_tokens=300)) == expected
    )
    assert len(decoded) == 2 * 4 * 5  # nothing twice
    decoded.clear()
    run_downstream(model, tokenizer, killed, data_dir, 3)
    assert decoded == []


def test_changed_checkpoints_and_prompts_are_scored_again(tmp_path, model, tokenizer, data_dir):
    run = tmp_path / "run"
    checkpoint(run, model, 10, 2.0)
    path = run / "rect_eval" / "edit_10" / "nli.jsonl"
    run_downstream(model, tokenizer, run, data_dir, tasks=["nli"])
    first = path.read_text("utf-8")
    checkpoint(run, model, 10, 6.0)
    run_downstream(model, tokenizer, run, data_dir, tasks=["nli"])
    second = path.read_text("utf-8")
    assert second != first
    file = data_dir / "task-data" / TASKS["nli"].file
    file.write_text(file.read_text("utf-8").replace("He said", "She said"), "utf-8")
    run_downstream(model, tokenizer, run, data_dir, tasks=["nli"])
    assert "She said" in path.read_text("utf-8")


# Bad input


def test_bad_input_gives_one_sentence(tmp_path, model, tokenizer, data_dir):
    run = tmp_path / "run"
    with pytest.raises(SphereError, match="No folder"):
        run_downstream(model, tokenizer, run, data_dir)
    checkpoint(run, model, 10)
    with pytest.raises(SphereError, match="Unknown downstream task 'nil'"):
        run_downstream(model, tokenizer, run, data_dir, tasks=["nil"])
    with pytest.raises(SphereError, match=r"No task data at .*test-reasoning\.jsonl: put the published file"):
        run_downstream(model, tokenizer, run, tmp_path)
    write_checkpoint(run, 10, {NAME: torch.zeros(3, 3)})
    with pytest.raises(SphereError, match=r"has shape \(3, 3\) there"):
        run_downstream(model, tokenizer, run, data_dir)
    write_checkpoint(run, 10, {"transformer.h.0.mlp.c_proj.weight": torch.zeros(3, 3)})
    with pytest.raises(SphereError, match="has no weight"):
        run_downstream(model, tokenizer, run, data_dir)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("reasoning", '{"question": "q", "answer": "no number"}\n', "Row 1 of .* is no reasoning example"),
        ("reasoning", '{"question": "q"}\n', "Row 1 of .* is no reasoning example"),
        (
            "open_domain_qa",
            '{"question": "q", "answer": ["a"], "output": []}',
            "is no open_domain_qa example",
        ),
        ("closed_domain_qa", '{"question": "q", "answer": "yes", "passage": "p"}', "neither true nor false"),
        ("closed_domain_qa", '{"question": \n', "Row 1 of .* is not valid JSON"),
        ("nli", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "is no nli example"),
        ("nli", "index\tsentence1\tsentence2\tlabel\n0\ta\n", "is no nli example"),
        ("nli", "", "holds no examples"),
        (
            "reasoning",
            '{"question": "\\ud800", "answer": "#### 3"}',
            "Row 1 of .* half of a surrogate pair, U.D800",
        ),
        (
            "open_domain_qa",
            '{"question": "q", "answer": ["\\udfff"], "output": ["p"]}',
            "Row 1 of .* half of a surrogate pair, U.DFFF",
        ),
    ],
)
def test_bad_rows_are_named(data_dir, name, text, words):
    (data_dir / "task-data" / TASKS[name].file).write_text(text, "utf-8")
    with pytest.raises(SphereError, match=words):
        TASKS[name].examples(data_dir)


# lm-evaluation-harness


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch, data_dir):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SphereError, match="requirements-extra"):
        Harness(["sphere_nli"], data_dir)


def test_every_task_has_its_yaml():
    assert {f"sphere_{name}" for name in TASKS} <= {path.stem for path in LOCAL_TASKS.glob("*.yaml")}


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-extra.txt)")


def test_harness_names_missing_data_and_unknown_tasks(tmp_path, lm_eval, model, tokenizer, data_dir):
    with pytest.raises(SphereError, match="which sphere_nli reads"):
        Harness(["sphere_nli"], tmp_path)
    (data_dir / "lm_eval_tasks").mkdir()
    odd = data_dir / "lm_eval_tasks" / "my_odd.yaml"
    odd.write_text(
        (LOCAL_TASKS / "sphere_nli.yaml").read_text("utf-8"), "utf-8"
    )  # file and task names differ
    checkpoint(tmp_path / "run", model, 0)
    with pytest.raises(SphereError, match="knows no task 'my_odd'"):
        run_downstream(model, tokenizer, tmp_path / "run", data_dir, 1, ["nli"], ["my_odd"])


def test_harness_prompts_and_scores_are_ours(tmp_path, lm_eval, model, tokenizer, data_dir, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness.render(harness.local_tasks(data_dir), data_dir, tmp_path / "yaml")
    loaded = TaskManager(include_path=str(tmp_path / "yaml"), include_defaults=False).load(
        [f"sphere_{name}" for name in TASKS]
    )["tasks"]
    for name, task in TASKS.items():
        theirs = loaded[f"sphere_{name}"]
        documents = list(theirs.test_docs())
        examples = task.examples(data_dir)
        assert [theirs.doc_to_text(document) for document in documents] == [e.prompt for e in examples]
        targets = [theirs.doc_to_target(document) for document in documents]
        assert [t if isinstance(t, list) else [t] for t in targets] == [list(e.answers) for e in examples]
        assert theirs.config.generation_kwargs["max_gen_toks"] == task.max_new_tokens

    checkpoint(tmp_path / "run", model, 0)
    given = tokenizer, tmp_path / "run", data_dir, 4, ["nli"], ["sphere_nli", "sphere_nli_choice"]
    summary = run_downstream(model, *given)
    entry = summary["checkpoints"]["edit_0"]
    assert entry["lm_eval"]["sphere_nli"]["exact_match"] == entry["tasks"]["nli"]["accuracy"]
    assert entry["lm_eval"]["sphere_nli_choice"].keys() >= {"acc", "f1", "mcc", "n", "limit"}
    samples = (tmp_path / "run/rect_eval/edit_0/lm_eval/sphere_nli_samples.jsonl").read_text("utf-8")
    assert len(samples.splitlines()) == 4

    asked, evaluate = [], lm_eval.simple_evaluate
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda *a, **o: asked.append(o["tasks"]) or evaluate(*a, **o)
    )
    assert run_downstream(model, *given) == summary
    assert asked == []
    file = data_dir / "task-data" / TASKS["nli"].file  # which both of them read
    file.write_text(file.read_text("utf-8").replace("He said", "She said"), "utf-8")
    run_downstream(model, *given)
    assert asked == [["sphere_nli", "sphere_nli_choice"]]
    run_downstream(model.to(torch.bfloat16), *given)
    assert len(asked) == 2


def test_each_filter_of_a_task_keeps_its_numbers(tmp_path, lm_eval, model, tokenizer, data_dir, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own, _, rest = (LOCAL_TASKS / "sphere_nli.yaml").read_text("utf-8").partition("filter_list:\n")
    steps = '[{function: map, mapping_dict: {}, default_value: "true"}, {function: take_first}]'
    everything = f"  - {{name: always, filter: {steps}}}\n"  # every output is read as true
    (data_dir / "lm_eval_tasks").mkdir()
    (data_dir / "lm_eval_tasks/two.yaml").write_text(
        f"{own.replace('task: sphere_nli', 'task: two')}filter_list:\n{everything}{rest}", "utf-8"
    )
    checkpoint(tmp_path / "run", model, 0)
    summary = run_downstream(model, tokenizer, tmp_path / "run", data_dir, 4, ["nli"], ["two"])
    entry = summary["checkpoints"]["edit_0"]
    found = entry["lm_eval"]["two"]
    right = [example.answers[0] for example in TASKS["nli"].examples(data_dir, 4)].count("true") / 4
    assert found["exact_match,first_class"] == entry["tasks"]["nli"]["accuracy"] != right
    assert found["exact_match,always"] == right
    assert "exact_match" not in found
    lines = [line.split() for line in format_downstream(summary).splitlines()]
    assert ["two", "(always)", "unedited", "4", f"{100 * right:.1f}"] in [line[:5] for line in lines]
    assert any(line[:2] == ["two", "(first_class)"] for line in lines)
