"""Prefixes in a store: their keys and values, and what runs behind them, are those of each sequence run alone."""

from __future__ import annotations

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, tiny_gpt2, tiny_hparams, tiny_llama

from sphere.forward.layers import LayerStack
from sphere.forward.packing import Scored
from sphere.forward.prefixes import PrefixStore, Segment
from sphere.forward.scorer import PackedScorer

MODELS = {"llama": (tiny_llama, LLAMA_MODULES), "gpt2": (tiny_gpt2, GPT2_MODULES)}
PREFIXES = [[5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6], [20, 21, 22], [20, 21, 22], [], [30]]
GROUPS = ["a", "a", "a", "b", "b", "b", "c"]
SUFFIXES = [[40, 41], [42], [43, 44, 45], [46], [47, 48], [49, 50], [51, 52, 53, 54]]


@pytest.fixture(params=MODELS)
def stack(request) -> LayerStack:
    build, modules = MODELS[request.param]
    return LayerStack(build(), tiny_hparams(modules))


def alone(stack: LayerStack, ids: list[int]) -> torch.Tensor:
    """Logits of a sequence by itself, (length x vocabulary)."""
    return stack.model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("batch_tokens", [1, 6, 1000])
def test_keys_and_values_are_those_of_running_alone(stack, batch_tokens):
    store = PrefixStore(stack, pad=0, batch_tokens=batch_tokens)
    slots = store.add(PREFIXES, GROUPS)
    rows = [[Segment(own, [99])] for own, prefix in zip(slots, PREFIXES, strict=True) if prefix]
    cached = store.inputs(rows)[stack.cache_argument].keys_and_values()
    for row, prefix in enumerate(prefix for prefix in PREFIXES if prefix):
        expected = stack.fill_cache({"input_ids": torch.tensor([prefix])}).keys_and_values()
        for (keys, values), (its_keys, its_values) in zip(cached, expected, strict=True):
            assert torch.allclose(keys[row, :, -len(prefix) :], its_keys[0], atol=1e-5)
            assert torch.allclose(values[row, :, -len(prefix) :], its_values[0], atol=1e-5)


def test_what_a_group_begins_with_has_its_slots_once(stack):
    slots = PrefixStore(stack, pad=0, batch_tokens=1000).add(PREFIXES, GROUPS)
    assert list(map(len, slots)) == list(map(len, PREFIXES))
    assert slots[0][:2] == slots[1][:2] == slots[2]  # all of group "a" begin so
    assert slots[3] == slots[4]
    assert slots[5] == []
    assert not set(slots[6]) & {slot for own in slots[:6] for slot in own}


@pytest.mark.parametrize("layout", [[[0], [1], [2], [3], [4], [5], [6]], [[0, 3, 5], [1, 2], [4, 6]]])
def test_suffixes_run_as_if_each_stood_alone(stack, layout):
    """One to a row, and several in common rows that do not see each other."""
    assert stack.takes_trees([1, 2, 3])
    store = PrefixStore(stack, pad=0, batch_tokens=1000)
    slots = store.add(PREFIXES, GROUPS)
    rows = [[Segment(slots[i], SUFFIXES[i]) for i in row] for row in layout]
    logits = stack.model(**store.inputs(rows)).logits  # rows x columns x vocabulary
    for number, row in enumerate(layout):
        column = 0
        for i in row:
            expected = alone(stack, PREFIXES[i] + SUFFIXES[i])[len(PREFIXES[i]) :]
            found = logits[number, column : column + len(SUFFIXES[i])]
            assert torch.allclose(found, expected, atol=1e-4)
            column += len(SUFFIXES[i])


def test_prefixes_are_added_to_those_that_are_there(stack):
    store = PrefixStore(stack, pad=0, batch_tokens=1000)
    first, (second,) = store.add(PREFIXES, GROUPS), store.add([[60, 61]], ["d"])
    assert not set(second) & {slot for own in first for slot in own}
    logits = stack.model(**store.inputs([[Segment(second, [62])]])).logits[0]
    assert torch.allclose(logits, alone(stack, [60, 61, 62])[2:], atol=1e-4)


@pytest.mark.parametrize("ids", [(5,), (5, 5), (5, 6)])
def test_short_sequences_show_whether_a_model_heeds_tree_masks(stack, ids, monkeypatch):
    """A single token has nothing to be scored, and two equal ones no fork: the probe sees to both."""
    assert stack.takes_trees(ids)
    scorer = PackedScorer(stack.model)
    assert scorer.takes_trees([Scored(ids, 1)])
    forward = stack.model.forward

    def deaf(input_ids, attention_mask, position_ids=None, **options):
        if attention_mask.ndim == 4:  # a tree mask, taken for none at all
            attention_mask = torch.ones_like(input_ids)
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )

    monkeypatch.setattr(stack.model, "forward", deaf)
    assert not PackedScorer(stack.model).takes_trees([Scored(ids, 1)])


def test_a_model_is_asked_again_when_sequences_grow(stack, monkeypatch):
    """A window of the model's own that masks do not know of, measured in columns of a row."""
    scorer, forward, window = PackedScorer(stack.model), stack.model.forward, 20
    asked = []

    def windowed(input_ids, attention_mask, position_ids=None, **options):
        if attention_mask.ndim == 4:
            asked.append(len(input_ids[0]))
            columns = torch.arange(len(input_ids[0]))
            near = (columns[:, None] - columns[None]).abs() < window
            attention_mask = attention_mask.masked_fill(~near, torch.finfo(torch.float32).min)
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )

    assert scorer.takes_trees([Scored((5, 6, 7), 1)])
    monkeypatch.setattr(stack.model, "forward", windowed)
    assert scorer.takes_trees([Scored((5, 6), 1)])
    assert not asked  # nothing longer than what the model was asked with
    assert not scorer.takes_trees([Scored(tuple(range(30)), 1)])
    assert not scorer.takes_trees([Scored((5, 6), 1)])
    assert len(asked) == 1
    found = scorer.score([Scored((5, 6, 7), 1), Scored((5, 6, 8), 1)])
    assert len(asked) == 1  # each in a row of its own
    assert found[Scored((5, 6, 7), 1)].nll.shape == (2,)


def test_a_row_as_wide_as_rows_are_shows_a_window_in_columns(stack, monkeypatch):
    """Sequences shorter than a window may have their beginning further off in a packed row."""
    forward = stack.model.forward

    def windowed(input_ids, attention_mask, position_ids=None, **options):
        if attention_mask.ndim == 4:
            columns = torch.arange(len(input_ids[0]))
            near = (columns[:, None] - columns[None]).abs() < 100
            attention_mask = attention_mask.masked_fill(~near, torch.finfo(torch.float32).min)
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )

    monkeypatch.setattr(stack.model, "forward", windowed)
    assert not PackedScorer(stack.model).takes_trees([Scored((5, 6, 7), 1)])
