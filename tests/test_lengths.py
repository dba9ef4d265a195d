"""Too long prompts are found before anything is run, all of them, in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import GPT2_MODULES, REQUESTS, tiny_hparams
from tiny_run import TinyRun, records
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel

from sphere import Editor, EditRequest, SphereError
from sphere.methods import get_method
from sphere.runs.run import execute
from sphere.values.lengths import CaseText, check_lengths, edited_texts, longest_sequence

TEMPLATES = (("{}",), ("So it was said. {}",))
LONG = "In a land far away, where it never rains and hardly ever snows, {} is"


def short_gpt2(positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=positions, eos_token_id=0, bos_token_id=0
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT", "ROME", "FT"])
def test_an_editor_refuses_before_it_runs_anything(method, tiny_tokenizer):
    kind = get_method(method).hparams_class
    if method == "FT":
        hparams = kind(layers=(1,), num_steps=1, lr=0.1, **GPT2_MODULES)
    else:
        changes = {"layers": [1]} if method == "ROME" else {}
        hparams = tiny_hparams(GPT2_MODULES, kind, **changes)
    model = short_gpt2()
    editor = Editor(model, tiny_tokenizer, method, hparams, context_templates=TEMPLATES, progress=False)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    requests = [REQUESTS[0], EditRequest(7, LONG, "Oz", "Rome"), EditRequest(9, LONG, "Atlantis", "Rome")]
    with pytest.raises(SphereError) as refused:
        editor.edit(requests)
    said = str(refused.value)
    assert "64 positions of GPT2LMHeadModel" in said
    assert re.search(r"case 7 \(.*?: \d\d tokens\), case 9 \(.*?: \d\d tokens\);", said)
    assert "case 0" not in said
    assert said.count(". ") == 0  # one sentence


def test_templates_count(tiny_tokenizer):
    request = EditRequest(
        3, "{} is called a", "The Great Bear of the northern sky", "bear"
    )  # 53 with its target
    model = short_gpt2()
    check_lengths(model, tiny_tokenizer, edited_texts([request], (("{}",),)))
    with pytest.raises(SphereError, match=r"case 3 \(prompt in its context with the new target: 67 tokens\)"):
        check_lengths(model, tiny_tokenizer, edited_texts([request], TEMPLATES))


def test_the_last_position_may_be_used(tiny_tokenizer):
    check_lengths(short_gpt2(), tiny_tokenizer, [CaseText(1, "text", "x" * 64)])
    with pytest.raises(SphereError, match=r"case 1 \(text: 65 tokens\)"):
        check_lengths(short_gpt2(), tiny_tokenizer, [CaseText(1, "text", "x" * 65)])


def test_characters_of_many_bytes_are_counted_as_tokens(tiny_tokenizer):
    with pytest.raises(SphereError, match="68 tokens"):
        check_lengths(short_gpt2(), tiny_tokenizer, [CaseText(1, "text", "😀" * 17)])


def test_a_model_without_a_limit_takes_anything(tiny_tokenizer):
    model = short_gpt2()
    model.config = BloomConfig()  # ALiBi: it has no positions
    assert longest_sequence(model) is None
    check_lengths(model, tiny_tokenizer, [CaseText(1, "text", "x" * 10_000)])


def test_many_cases_are_counted(tiny_tokenizer):
    texts = [CaseText(i, "text", "x" * 70) for i in range(1500)]
    with pytest.raises(SphereError, match=r"case 19 \(text: 70 tokens\) and 1480 more; shorten or remove"):
        check_lengths(short_gpt2(), tiny_tokenizer, texts)


@pytest.mark.parametrize(
    "where", ["paraphrase_prompts", "neighborhood_prompts", "prompt", "generation_prompts"]
)
def test_a_run_refuses_before_its_first_batch(where, tmp_path: Path, tiny_tokenizer, monkeypatch):
    """The last record's scored prompts too, though nothing but scoring would run them."""
    tiny = TinyRun(tmp_path, tiny_tokenizer, 4)
    content, long = records(4), "word " * 60
    if where == "prompt":
        content[3]["requested_rewrite"]["prompt"] = long + "{} is in"
    else:
        content[3][where] = [long.strip()]
    tiny.write_records(content)
    monkeypatch.setattr(Editor, "edit", lambda *_: pytest.fail("a batch was edited"))
    with pytest.raises(SphereError, match=r"256 positions of LlamaForCausalLM: case 3 \("):
        execute(tiny.config())
    assert not list((tmp_path / "stats").rglob("*down_proj*"))  # nor were statistics computed
