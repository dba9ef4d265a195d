"""Prefix trees in packed rows: who sees whom, how they are cut into passes, and each path scored as if alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from sphere.errors import SphereError
from sphere.forward.packing import PackedRow, Scored, batches, model_inputs, one_per_row, pack_trees
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer

FORK = [Scored((7, 8, 9, 10, 11), 3), Scored((7, 8, 9, 20), 3), Scored((7, 8, 30, 31), 2)]
NESTED = [Scored((7, 8, 9), 1), Scored((7, 8, 9, 10, 11), 1), Scored((7, 8, 9, 10, 11), 4)]
SINGLE = [Scored((5, 6), 1), Scored((5, 7), 1), Scored((6, 6), 1)]  # one token before, one scored
APART = [Scored((40, 41, 42), 1), Scored((50, 51, 52, 53), 2), Scored((60, 61), 1)]
SETS = {
    "fork": FORK,
    "nested": NESTED,
    "single": SINGLE,
    "apart": APART,
    "all": FORK + NESTED + SINGLE + APART,
}


def tiny_bloom() -> BloomForCausalLM:
    """ALiBi: its positions come from the mask, so that no tree fits into it."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return BloomForCausalLM(config).eval()


def tiny_mamba() -> MambaForCausalLM:
    """Recurrent: it has no attention whose mask could be given."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2
    )
    return MambaForCausalLM(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bloom": tiny_bloom, "mamba": tiny_mamba}
TREES = {"llama": True, "gpt2": True, "bloom": False, "mamba": False}


@torch.no_grad()
def alone(model: Any, scored: Scored) -> tuple[np.ndarray, list[int]]:
    """NLLs and argmaxes of a sequence's scored tokens, from a pass of its own."""
    logits = model(torch.tensor([scored.ids])).logits[0, scored.start - 1 : -1].double()
    wanted = torch.tensor(scored.ids[scored.start :])
    nll = -logits.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return nll.numpy(), logits.argmax(-1).tolist()


def assert_as_if_alone(model: Any, sequences: Sequence[Scored], found: Any) -> None:
    assert found.keys() == set(sequences)
    for scored, scores in found.items():
        nll, predicted = alone(model, scored)
        assert scores.nll == pytest.approx(nll, abs=1e-4)
        assert scores.predicted.tolist() == predicted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequences", SETS.values(), ids=SETS)
def test_every_path_is_scored_as_if_alone(name, sequences):
    model = MODELS[name]()
    scorer = PackedScorer(model)
    assert_as_if_alone(model, sequences, scorer.score(sequences))
    assert scorer.trees is TREES[name]


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("batch_tokens", [1, 7, 20])
def test_passes_of_any_size_give_the_same(name, batch_tokens):
    model = MODELS[name]()
    found = PackedScorer(model, PassOptions(batch_tokens=batch_tokens)).score(SETS["all"])
    assert_as_if_alone(model, SETS["all"], found)


def test_a_path_does_not_feel_its_neighbors():
    """Bit for bit: what stands beside a path in its row, or behind the fork, has no way into it."""
    model = tiny_llama()
    rows = []
    for other in (20, 99):
        (row,) = pack_trees([FORK[0], Scored((7, 8, 9, other), 3), Scored((other, other), 1)])
        with torch.no_grad():
            logits = model(**model_inputs(model, [row], trees=True)).logits[0]
        path = next(path for scored, path in row.paths if scored == FORK[0])
        rows.append(logits[path])
    assert torch.equal(*rows)


def test_shared_prefixes_are_laid_out_once():
    (row,) = pack_trees(FORK + NESTED)
    assert sorted(row.tokens) == [7, 8, 9, 10, 11, 20, 30, 31]
    at = {token: node for node, token in enumerate(row.tokens)}
    assert [row.parents[at[token]] for token in (7, 8, 9, 20, 30, 31)] == [
        -1,
        at[7],
        at[8],
        at[9],
        at[8],
        at[30],
    ]
    assert [row.depths[at[token]] for token in (7, 8, 9, 10, 11, 20, 30, 31)] == [0, 1, 2, 3, 4, 3, 2, 3]
    assert row.scored_nodes == {at[token] for token in (7, 8, 9, 10, 30)}  # what predicts the scored tokens


def test_a_node_sees_its_ancestors_and_padding_sees_itself():
    (row,) = pack_trees([Scored((1, 2), 1), Scored((1, 3), 1), Scored((4, 5), 1)])
    assert row.tokens == [1, 2, 3, 4, 5]
    assert row.attention(6).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("trees", [True, False])
def test_inputs_are_padded_on_the_right(trees):
    model = tiny_llama()
    rows = pack_trees(APART, 4) if trees else one_per_row(APART)
    inputs = model_inputs(model, rows, trees)
    length = max(len(row.tokens) for row in rows)
    assert inputs["input_ids"].shape == (len(rows), length)
    for ids, row in zip(inputs["input_ids"].tolist(), rows, strict=True):
        assert ids[: len(row.tokens)] == row.tokens
    if trees:
        assert inputs["attention_mask"].shape == (len(rows), 1, length, length)
        assert inputs["position_ids"].shape == (len(rows), length)
    else:
        assert inputs["attention_mask"].sum(1).tolist() == [len(row.tokens) for row in rows]


SEQUENCES = st.lists(
    st.lists(st.integers(0, 3), min_size=2, max_size=8).flatmap(
        lambda ids: st.integers(1, len(ids) - 1).map(lambda start: Scored(tuple(ids), start))
    ),
    max_size=20,
)


@settings(deadline=None)
@given(SEQUENCES, st.integers(1, 30))
def test_packing_keeps_every_sequence(sequences, row_tokens):
    for rows in (pack_trees(sequences, row_tokens), one_per_row(sequences)):
        found = [scored for row in rows for scored, _ in row.paths]
        assert sorted(found) == sorted(set(sequences))
        for row in rows:
            assert len(row.tokens) <= max(row_tokens, max(len(scored.ids) for scored, _ in row.paths))
            sees = row.attention(len(row.tokens) + 1)
            for scored, path in row.paths:
                assert tuple(row.tokens[node] for node in path) == scored.ids
                assert [row.depths[node] for node in path] == list(range(len(path)))
                assert sorted(path) == [i for i, seen in enumerate(sees[path[-1]]) if seen]


@settings(deadline=None)
@given(SEQUENCES, st.integers(1, 40), st.integers(1, 10))
def test_passes_hold_what_they_may(sequences, batch_tokens, batch_scored):
    rows = pack_trees(sequences, 10)
    made = list(batches(rows, batch_tokens, batch_scored))
    assert [row for batch in made for row in batch] == rows
    for batch in made:
        padded = len(batch) * max(len(row.tokens) for row in batch)
        scored = sum(len(row.scored_nodes) for row in batch)
        assert len(batch) == 1 or (padded <= batch_tokens and scored <= batch_scored)


def test_nothing_and_too_much():
    scorer = PackedScorer(tiny_llama())
    assert scorer.score([]) == {}
    with pytest.raises(SphereError, match="only 256 positions"):
        scorer.score([Scored(tuple(range(257)), 1)])


def test_a_row_begins_empty():
    row = PackedRow()
    assert row.shared((1, 2)) == []
    row.add(Scored((1, 2, 3), 1), [])
    assert row.shared((1, 2, 9)) == [0, 1]
    assert row.shared((9,)) == []
