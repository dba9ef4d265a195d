"""What the unedited and the edited model say, side by side: against plain passes, and on the command line."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_MODULES, REQUESTS, tiny_gpt2, tiny_hparams, tiny_llama
from test_chat_template import CHATML
from tiny_run import TinyRun, command
from transformers import PreTrainedTokenizerFast

from sphere import Editor, load_model
from sphere.answers import AskOptions, Question, answers, questions_of
from sphere.checkpoints import read_weights
from sphere.commands.main import main
from sphere.errors import SphereError
from sphere.evaluation.ask_run import compare_runs, open_source, read_questions, short_labels
from sphere.evaluation.run_model import ModelOptions
from sphere.export import export_run
from sphere.runs.run import execute

PROMPT = "Abcde is in"
PROMPTS = ["Abcde is in", "The capital of Oz, a country, is"]  # of different lengths: rows are padded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """Files of tiny runs."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end|>"
    )
    tokenizer.chat_template = CHATML
    return TinyRun(tmp_path_factory.mktemp("ask"), tokenizer)


@pytest.fixture(scope="module")
def run(tiny: TinyRun) -> Path:
    """The folder of a run of 4 edits in batches of 2."""
    return execute(tiny.config(dataset_size_limit=4)).folder


def plain(model, tokenizer, prompt: str, n_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy token ids and the first step's probabilities, by one whole pass a token."""
    ids, first = tokenizer(prompt)["input_ids"], None
    new: list[int] = []
    for _ in range(n_tokens):
        logits = model(torch.tensor([ids + new])).logits[0, -1]
        first = logits.softmax(-1) if first is None else first
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return new, first


def plain_probability(model, tokenizer, prompt: str, target: str) -> float:
    """Product of the probabilities of a target's tokens."""
    before, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {target}")["input_ids"]
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return math.exp(sum(float(log_p[i - 1, ids[i]]) for i in range(before, len(ids))))


def test_answers_are_those_of_plain_passes(tiny_tokenizer):
    model = tiny_llama()
    said = answers(model, tiny_tokenizer, questions_of(PROMPTS, ["Rome", "Oslo"]), AskOptions(n_tokens=6))
    for prompt, answer in zip(PROMPTS, said, strict=True):
        new, first = plain(model, tiny_tokenizer, prompt, 6)
        assert answer.text == tiny_tokenizer.decode(new, skip_special_tokens=True)
        likely = first.topk(5)
        assert [token for token, _ in answer.next_tokens] == [
            tiny_tokenizer.decode([i]) for i in likely.indices
        ]
        assert [p for _, p in answer.next_tokens] == pytest.approx(likely.values.tolist(), rel=1e-4)
        for target, probability in answer.targets.items():
            expected = plain_probability(model, tiny_tokenizer, prompt, target)
            assert probability == pytest.approx(expected, rel=1e-3)


def test_drawn_answers_repeat_and_leave_the_random_state(tiny_tokenizer):
    model, options = tiny_llama(), AskOptions(temperature=1.0, n_tokens=8, seed=3)
    state = torch.get_rng_state()
    first, second = (answers(model, tiny_tokenizer, questions_of(PROMPT), options) for _ in range(2))
    other = answers(
        model, tiny_tokenizer, questions_of(PROMPT), AskOptions(temperature=1.0, n_tokens=8, seed=4)
    )
    assert first == second
    assert other[0].text != first[0].text
    assert torch.equal(torch.get_rng_state(), state)


def test_the_editor_asks_both_models_and_changes_neither(tiny_tokenizer, tmp_path):
    model = tiny_llama()
    editor = Editor(
        model, tiny_tokenizer, "AlphaEdit", tiny_hparams(LLAMA_MODULES), stats_dir=tmp_path, progress=False
    )
    before = answers(model, tiny_tokenizer, questions_of(REQUESTS[0].text, ["Welsh"]))[0]
    editor.edit(REQUESTS)
    edited = editor.weights.snapshot()
    (asked,) = editor.ask(REQUESTS[0].text, ["Welsh"])
    assert list(asked.answers) == ["unedited", "edited"]
    assert asked.answers["unedited"] == before
    assert (
        asked.answers["edited"]
        == answers(model, tiny_tokenizer, questions_of(REQUESTS[0].text, ["Welsh"]))[0]
    )
    assert asked.answers["edited"].targets["Welsh"] > before.targets["Welsh"]
    assert all(torch.equal(edited[name], now) for name, now in editor.weights.snapshot().items())
    editor.edit(REQUESTS[:1])  # nobody has changed its weights


def test_a_run_is_asked_in_its_last_state_or_another(run, tiny, monkeypatch, capsys):
    model, tokenizer = load_model(str(tiny.model), device="cpu")
    for flags, checkpoint in ([], 4), (["--checkpoint", "2"], 2):
        arguments = [
            "ask",
            str(run),
            *flags,
            PROMPT,
            "--targets",
            "Rome",
            "Oslo",
            "--json",
            "--n_tokens",
            "4",
        ]
        code, out, err = command(main, arguments, monkeypatch, capsys)
        assert code == 0, err
        found = json.loads(out)
        assert set(found["answers"]) == {"unedited", "edited"}
        for state, n in ("unedited", 0), ("edited", checkpoint):
            for name, weight in read_weights(run / f"edit_{n}.safetensors").items():
                model.get_parameter(name).copy_(weight)
            expected = answers(
                model, tokenizer, [Question(PROMPT, ("Rome", "Oslo"))], AskOptions(n_tokens=4)
            )[0]
            assert found["answers"][state]["text"] == expected.text
            assert found["answers"][state]["targets"] == pytest.approx(expected.targets)


def test_the_table_has_a_column_for_each_model(run, monkeypatch, capsys):
    code, out, _ = command(main, ["ask", str(run), PROMPT, "--targets", "Rome"], monkeypatch, capsys)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"> {PROMPT}"
    assert lines[1].split() == ["unedited", "edited"]
    (row,) = (line for line in lines if line.startswith("p(Rome)"))
    assert row.count("%") == 2


def test_prompts_come_from_a_pipe_a_file_and_a_prompt_line(run, tmp_path, monkeypatch, capsys):
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join([PROMPT, "", "Ann is in"]))
    ask = ["ask", str(run), "--json", "--n_tokens", "2"]

    def prompts(arguments: list[str]) -> list[str]:
        code, out, err = command(main, arguments, monkeypatch, capsys)
        assert code == 0, err
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return [json.loads(line)["prompt"] for line in lines]

    assert prompts([*ask, "--prompts", str(text)]) == [PROMPT, "Ann is in"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Bo is in\n\nCy is in\n"))
    assert prompts(ask) == ["Bo is in", "Cy is in"]
    terminal, typed = io.StringIO(), iter(["Di is in", "  "])
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)

    def read(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert prompts(ask) == ["Di is in"]


def test_a_table_of_facts_is_asked_with_its_answers(tmp_path):
    table = tmp_path / "facts.csv"
    table.write_text("prompt,subject,target_new,target_true\n{} is in,Ann,Rome,Paris\n{} is in,Bo,Oslo,\n")
    assert read_questions(table) == [
        Question("Ann is in", ("Rome", "Paris")),
        Question("Bo is in", ("Oslo",)),
    ]


def test_a_chat_template_surrounds_the_prompt(run, tiny, monkeypatch, capsys):
    model, tokenizer = load_model(str(tiny.model), device="cpu")
    code, out, _ = command(
        main, ["ask", str(run), PROMPT, "--chat_template", "--json", "--n_tokens", "4"], monkeypatch, capsys
    )
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    assert code == 0
    expected = answers(model, tokenizer, questions_of(turn), AskOptions(n_tokens=4))[0]
    assert json.loads(out)["answers"]["unedited"]["text"] == expected.text


def test_an_exported_model_is_asked_beside_its_base(run, tiny, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model(str(tiny.model), device="cpu")
    for name, weight in read_weights(run / "edit_4.safetensors").items():
        model.get_parameter(name).copy_(weight)
    export = tmp_path / "export"
    model.save_pretrained(export)
    tokenizer.save_pretrained(export)
    flags = [PROMPT, "--targets", "Rome", "--json"]
    _, of_run, _ = command(main, ["ask", str(run), *flags], monkeypatch, capsys)
    _, alone, _ = command(main, ["ask", str(export), *flags], monkeypatch, capsys)
    assert list(json.loads(alone)["answers"]) == ["edited"]
    (export / "README.md").write_text(f"---\nbase_model: {tiny.model}\n---\nA card.\n")
    _, both, _ = command(main, ["ask", str(export), *flags], monkeypatch, capsys)
    assert json.loads(both) == json.loads(of_run)


def test_an_adapter_is_asked_with_its_model(run, tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    export_run(run, "peft", tmp_path / "adapter", device="cpu")
    flags = [PROMPT, "--targets", "Rome", "--json"]
    _, of_run, _ = command(main, ["ask", str(run), *flags], monkeypatch, capsys)
    code, of_adapter, err = command(main, ["ask", str(tmp_path / "adapter"), *flags], monkeypatch, capsys)
    assert code == 0, err
    expected, found = (json.loads(text)["answers"] for text in (of_run, of_adapter))
    assert found["unedited"] == expected["unedited"]
    assert found["edited"]["text"] == expected["edited"]["text"]
    assert found["edited"]["targets"] == pytest.approx(expected["edited"]["targets"], rel=1e-3)


@pytest.mark.parametrize(
    "card", ["---\n- a\n- list\n---\n", "---\na: [\n---\n", b"---\n\xff\n---\n", "---\nbase_model: 5\n---\n"]
)
def test_a_card_that_cannot_be_read_names_no_base(tiny, tmp_path, card):
    export = tmp_path / "export"
    shutil.copytree(tiny.model, export)
    (export / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert list(open_source(export, ModelOptions(device="cpu")).others) == ["edited"]


def test_what_is_wrong_with_an_adapter_is_said_in_a_sentence(run, tmp_path, tiny_tokenizer):
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    export_run(run, "peft", adapter, device="cpu")
    narrow = tiny_llama()
    narrow = type(narrow)(type(narrow.config)(**narrow.config.to_dict() | {"intermediate_size": 40}))
    for name, model in {"gpt2": tiny_gpt2(), "narrow": narrow}.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(
            SphereError, match=r"cannot be put on the model .*(not found|size mismatch)"
        ) as error:
            open_source(adapter, ModelOptions(model_name=str(tmp_path / name), device="cpu"))
        assert error.value.arguments == ("model_name",)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SphereError, match=r"weights of the adapter .* cannot be read .*get its files anew"):
        open_source(adapter, ModelOptions(device="cpu"))
    weights.unlink()
    with pytest.raises(SphereError, match=r"adapter .* has no weights"):
        open_source(adapter, ModelOptions(device="cpu"))
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(SphereError, match="does not name its model"):
        open_source(adapter, ModelOptions(device="cpu"))


def test_runs_are_compared(run, tiny, tmp_path, monkeypatch, capsys):
    other = execute(tiny.config(dataset_size_limit=4, beta_hse=0.0)).folder
    monkeypatch.setenv("COLUMNS", "200")
    table = tmp_path / "facts.csv"
    table.write_text("prompt,subject,target_new\n{} is in,Ann,Rome\n{} is in,Bo,Oslo\n")
    code, out, err = command(
        main, ["compare", str(run), str(other), "--prompts", str(table)], monkeypatch, capsys
    )
    assert code == 0, err
    labels = short_labels([run, other])
    assert out.splitlines()[1].split() == ["unedited", *labels]
    assert [line.partition(":")[0] for line in out.splitlines()[-2:]] == labels
    assert "of 2 continuations differ" in out


def test_runs_of_different_models_have_each_their_unedited_one(run, tiny, tmp_path, tiny_tokenizer):
    world = tiny.copy(tmp_path / "world")
    tiny_llama(seed=1).save_pretrained(world.model)
    other = execute(world.config("others", dataset_size_limit=2)).folder
    asked = compare_runs([run, other], [Question(PROMPT)], ModelOptions())[0]
    labels = short_labels([run, other])
    assert list(asked.answers) == [f"unedited {labels[0]}", labels[0], f"unedited {labels[1]}", labels[1]]
    assert asked.answers[f"unedited {labels[0]}"] != asked.answers[f"unedited {labels[1]}"]


def test_runs_that_ask_in_different_forms_have_each_their_unedited_one(run, tiny):
    other = execute(tiny.config(dataset_size_limit=2, chat_template=True)).folder
    model, tokenizer = load_model(str(tiny.model), device="cpu")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    asking = AskOptions(n_tokens=4)
    found = compare_runs([run, other], [Question(PROMPT)], ModelOptions(device="cpu"), asking)[0].answers
    labels = short_labels([run, other])
    assert list(found) == [f"unedited {labels[0]}", labels[0], f"unedited {labels[1]}", labels[1]]
    for label, prompt in zip(labels, (PROMPT, turn), strict=True):
        assert found[f"unedited {label}"] == answers(model, tokenizer, questions_of(prompt), asking)[0]
    in_chat = ModelOptions(device="cpu", chat_template=True)
    (same,) = compare_runs([run, other], [Question(PROMPT)], in_chat, asking)
    assert list(same.answers) == ["unedited", *labels]


def bad(arguments, monkeypatch, capsys) -> str:
    """The sentence of a command that fails."""
    code, _, err = command(main, arguments, monkeypatch, capsys)
    assert code == 2
    return err


def test_what_cannot_be_asked_is_said_in_a_sentence(run, tiny, tmp_path, monkeypatch, capsys):
    ask = ["ask", str(run)]
    assert "no checkpoint after 3 edits, but after 0, 2, 4" in bad(
        [*ask, PROMPT, "--checkpoint", "3"], monkeypatch, capsys
    )
    assert "No folder" in bad(["ask", str(tmp_path / "none"), PROMPT], monkeypatch, capsys)
    assert "Prompt 1 is blank" in bad([*ask, "  "], monkeypatch, capsys)
    assert "target of prompt 1 is blank" in bad([*ask, PROMPT, "--targets", ""], monkeypatch, capsys)
    assert "leaves none of the model's 256 positions" in bad([*ask, "a" * 300], monkeypatch, capsys)
    assert "(--temperature)" in bad([*ask, PROMPT, "--temperature", "-1"], monkeypatch, capsys)
    assert "Cannot read the prompts" in bad(
        [*ask, "--prompts", str(tmp_path / "none.txt")], monkeypatch, capsys
    )
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompts" in bad([*ask, "--prompts", str(tmp_path / "empty.txt")], monkeypatch, capsys)
    assert "has no checkpoints" in bad(
        ["ask", str(tiny.model), PROMPT, "--checkpoint", "2"], monkeypatch, capsys
    )
    (tmp_path / "one.txt").write_text(PROMPT)
    assert "at least two runs" in bad(
        ["compare", str(run), "--prompts", str(tmp_path / "one.txt")], monkeypatch, capsys
    )
    without = tmp_path / "published"
    shutil.copytree(run, without)
    (without / "run.json").unlink()
    assert "(--model_name)" in bad(["ask", str(without), PROMPT], monkeypatch, capsys)


def test_another_model_than_the_runs_is_refused(run, tmp_path, tiny_tokenizer):
    tiny_llama(seed=1).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SphereError, match="another model"):
        open_source(run, ModelOptions(model_name=str(tmp_path)))
