"""Causal tracing, against one run at a time, and what is made of its effects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, tiny_gpt2, tiny_hparams, tiny_llama
from tiny_run import space_sayer
from transformers import PreTrainedTokenizerBase

from benchmarks.plain.causal_trace import plain_causal_trace
from sphere.forward.layers import LayerStack
from sphere.forward.scorer import PackedScorer
from sphere.requests import EditRequest
from sphere.tuning.causal_trace import (
    NOISE_FACTOR,
    Statement,
    causal_trace,
    choose_layers,
    cut,
    known_facts,
    subject_noise,
)

STATEMENTS = [
    Statement("The mother tongue of {} is", "Ann Lee", "Welsh"),
    Statement("{} plays the", "Bo", "organ"),  # nothing before the subject
    Statement("{} is a", "X", "letter"),  # whose first token is its last one
    Statement("The capital of {}, a country, is", "Oz", "Rome"),
]


def facts_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    facts = [cut(tokenizer, statement) for statement in STATEMENTS]
    assert all(facts)
    return facts


@pytest.mark.parametrize("batch_tokens", [1, 60])
@pytest.mark.parametrize(
    ("model", "modules"), [(tiny_llama(), LLAMA_MODULES), (tiny_gpt2(), GPT2_MODULES)], ids=["llama", "gpt2"]
)
def test_it_is_what_one_run_at_a_time_gives(
    model: Any, modules: dict[str, str], batch_tokens: int, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    facts = facts_of(tiny_tokenizer)
    noise = subject_noise(model.get_input_embeddings(), facts, 2, seed=0)
    stack = LayerStack(model, tiny_hparams(modules))
    trace = causal_trace(stack, facts, noise, batch_tokens=batch_tokens, progress=False)
    for n, statement in enumerate(STATEMENTS):
        request = EditRequest(n, statement.prompt, statement.subject, statement.answer)
        clean, corrupted, restored = plain_causal_trace(
            model, tiny_tokenizer, request, noise[n], modules["layer_module_tmp"]
        )
        assert float(trace.clean[n]) == pytest.approx(clean, rel=1e-4)
        assert trace.corrupted[n].tolist() == pytest.approx(corrupted, rel=1e-3)
        assert trace.restored[n].flatten().tolist() == pytest.approx(list(chain(*restored)), rel=1e-3)
    effects = trace.restored.mean(1) - trace.corrupted.mean(1)[:, None]
    assert torch.allclose(trace.average, effects.mean(0))


def test_noise_has_the_subjects_scale_and_follows_the_seed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    facts, embedding = facts_of(tiny_tokenizer), tiny_llama().get_input_embeddings()
    noise = subject_noise(embedding, facts, 300, seed=1)
    assert [part.shape for part in noise] == [
        (300, fact.lookup - fact.first + 1, embedding.weight.shape[1]) for fact in facts
    ]
    ids = [token for fact in facts for token in fact.ids[fact.first : fact.lookup + 1]]
    sigma = float(embedding.weight[ids].std())
    assert float(torch.cat([p.flatten() for p in noise]).std()) == pytest.approx(
        NOISE_FACTOR * sigma, rel=0.02
    )
    again = subject_noise(embedding, facts, 300, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(noise, again, strict=True))
    assert not torch.equal(noise[0], subject_noise(embedding, facts, 300, seed=2)[0])


def test_known_is_what_the_model_would_say_itself(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that says a space or something else by the sign of one feature: a space follows every prompt."""
    model = space_sayer(tiny_tokenizer)
    statements = [Statement(f"{{}} i{letter}", "Ann", "x") for letter in "abcdefghijklmnopqrstuvwxyz"]
    facts = [fact for fact in (cut(tiny_tokenizer, s) for s in statements) if fact]
    known = [fact for fact in facts if _next(model, fact.ids) == fact.answer]
    assert 0 < len(known) < len(facts) == 26
    assert known_facts(PackedScorer(model), tiny_tokenizer, statements, 30) == known
    assert known_facts(PackedScorer(model), tiny_tokenizer, statements, 2) == known[:2]


def _next(model: Any, ids: tuple[int, ...]) -> int:
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


def test_a_prompt_that_ends_with_its_subject_is_not_traced(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert cut(tiny_tokenizer, Statement("Say who is {}", "Ann", "she")) is None


@pytest.mark.parametrize(
    ("average", "count", "editable", "layers"),
    [
        ([0, 1, 2, 9, 3, 1], 1, range(6), (3,)),
        ([0, 1, 2, 9, 3, 1], 3, range(6), (1, 2, 3)),
        ([9, 1, 2, 3, 3, 1], 5, range(6), (0, 1, 2, 3, 4)),  # not below layer 0
        ([0, 1, 2, 9, 3, 1], 2, [0, 2, 4, 5], (0, 2)),
        ([0, 1, 2, 3, 3, 9], 2, [0, 2, 4], (2, 4)),
    ],
)
def test_the_window_ends_at_the_peak(
    average: list[float], count: int, editable: Sequence[int], layers: tuple[int, ...]
) -> None:
    assert choose_layers(torch.tensor(average, dtype=torch.float), count, editable) == layers
