"""Context templates: sampled as documented, whatever generation defaults a model brings along."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from transformers import GenerationConfig

from sphere import EditRequest
from sphere.forward.generate import generate
from sphere.hparams import N_CONTEXT_TEMPLATES
from sphere.values.context_templates import BEGINNINGS, fill, generate_context_templates
from sphere.values.self_text import sample_documents

DEFAULTS = {
    "repetition_penalty": 1.3,
    "temperature": 0.3,
    "top_p": 0.5,
    "no_repeat_ngram_size": 2,
    "min_p": 0.2,
}


def with_defaults(model, **defaults):
    """The model as if its generation_config.json held these."""
    model.generation_config = GenerationConfig(**({"do_sample": True, **DEFAULTS} | defaults))
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_models_own_defaults_change_no_template(build, tiny_tokenizer):
    model = with_defaults(build())
    own = model.generation_config
    found = generate_context_templates(model, tiny_tokenizer, 3)
    assert found == generate_context_templates(build(), tiny_tokenizer, 3)
    assert model.generation_config is own


def test_a_models_own_defaults_change_no_sampled_text(tiny_tokenizer):
    plain = sample_documents(tiny_llama(), tiny_tokenizer, 5, 12, 0, progress=False)
    assert plain == sample_documents(
        with_defaults(tiny_llama(), suppress_tokens=[5]), tiny_tokenizer, 5, 12, 0, progress=False
    )


def test_templates_are_five_continuations_and_the_bare_prompt(tiny_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        groups = generate_context_templates(tiny_llama(), tiny_tokenizer, 0)
    assert groups[0] == ("{}",)
    assert len(groups[1]) == len(BEGINNINGS)
    for template, beginning in zip(groups[1], BEGINNINGS, strict=True):
        assert template.startswith(beginning)
        assert template.endswith(". {}")
        assert template.count("{") == template.count("}") == 1
    assert "Context templates: " in caplog.text


def test_the_seed_decides_and_the_random_state_stays(tiny_tokenizer):
    state = torch.get_rng_state()
    found = [generate_context_templates(tiny_llama(), tiny_tokenizer, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_every_token_is_one_of_the_five_likeliest(tiny_tokenizer):
    model, config = tiny_llama(), GenerationConfig(do_sample=True, top_k=5, max_new_tokens=8, pad_token_id=0)
    torch.manual_seed(0)
    ids = generate(with_defaults(model), [[7, 8, 9]], config)  # 1 x 11
    likeliest = model(ids).logits[0].topk(5).indices  # positions x 5
    assert all(int(ids[0, i + 1]) in likeliest[i].tolist() for i in range(2, 10))


def test_rows_of_different_length_are_continued_as_alone():
    model, config = tiny_llama(), GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0)
    rows = [[7, 8, 9, 10, 11], [3], [4, 5]]
    together = generate(with_defaults(model), rows, config)
    for row, found in zip(rows, together, strict=True):
        assert found[5 - len(row) :].tolist() == generate(model, [row], config)[0].tolist()


def test_fill_puts_prompt_and_subject_into_a_template():
    request = EditRequest(0, "The tongue of {} is", "Ann Lee", "Welsh")
    filled = fill("The sky is blue. {}", request)
    assert filled.text == "The sky is blue. The tongue of Ann Lee is"
    assert filled.text[: filled.subject_end].endswith("of Ann Lee")
    assert fill("{}", request).text == request.text
    assert fill("{}", request).subject_end == request.subject_end


@pytest.mark.parametrize("n", [0, 2])
def test_fewer_templates_are_the_first_of_them(n, tiny_tokenizer):
    bare, sampled = generate_context_templates(tiny_llama(), tiny_tokenizer, 3)
    assert generate_context_templates(tiny_llama(), tiny_tokenizer, 3, n) == (
        (bare, sampled[:n]) if n else (bare,)
    )


def test_hyperparameters_know_how_many_there_are():
    assert len(BEGINNINGS) == N_CONTEXT_TEMPLATES
