"""Perplexity and weight changes of each state of a run, beside plain ones; kept until they must be measured again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2
from test_evaluate_run import NAMES, changed, counterfact, evaluate, make_run, tiny_model, tiny_tokenizer
from torch import Tensor

from sphere.checkpoints import read_weights, write_checkpoint
from sphere.evaluation import state_metrics
from sphere.evaluation.perplexity import TEXT_NAME, read_paragraphs
from sphere.evaluation.states import RunStates
from sphere.evaluation.summary import format_table
from sphere.evaluation.weight_change import WeightChange
from sphere.hypersphere import energy_change
from sphere.weights import EditedWeights

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setting(tmp_path):
    model = tiny_model()
    make_run(tmp_path, model)
    return model, tiny_tokenizer(), tmp_path


def plain_perplexity(model, tokenizer) -> float:
    """One paragraph at a time, cut to the model's positions."""
    total, count = 0.0, 0
    for paragraph in read_paragraphs(ROOT / "data" / TEXT_NAME):
        ids = tokenizer(paragraph, return_tensors="pt")["input_ids"][
            :, : model.config.max_position_embeddings
        ]
        logits = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(logits.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return math.exp(total / count)


def plain_basis(weight: Tensor) -> Tensor:
    """Principal directions at a cumulative ratio of one half, by an eigendecomposition of the (in x in) matrix."""
    neurons = weight.double() / weight.double().norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(neurons.T @ neurons)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int(((values.cumsum(0) / values.sum()) <= 0.5).sum()) + 1
    return vectors[:, :rank]


def plain_rotation(before: Tensor, after: Tensor) -> float:
    """Mean squared sine of the principal angles."""
    cosines = torch.linalg.svdvals(plain_basis(before).T @ plain_basis(after))
    return float(1 - cosines.square().mean())


def test_each_row_says_what_became_of_the_model(setting):
    model, tokenizer, folder = setting
    rows = evaluate(setting, counterfact(9))["checkpoints"]
    assert rows[0]["weights"] is None
    assert rows[0]["text_perplexity"] == pytest.approx(plain_perplexity(model, tokenizer), rel=1e-4)
    before = read_weights(folder / "edit_0.safetensors")
    for row in rows[1:]:
        after = read_weights(folder / row["checkpoint"])
        layers = row["weights"]["layers"]
        assert list(layers) == NAMES
        for name, layer in layers.items():
            assert layer["energy_change"] == pytest.approx(energy_change(after[name], before[name]), rel=1e-4)
            assert layer["rotation"] == pytest.approx(plain_rotation(before[name], after[name]), abs=1e-5)
            assert layer["change_norm"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-5)
        for key in ("energy_change", "rotation", "change_norm"):
            values = [layer[key] for layer in layers.values()]
            assert row["weights"][key] == pytest.approx(sum(values) / 2)
        with EditedWeights(model, NAMES).temporarily():
            EditedWeights(model, NAMES).restore(after)
            assert row["text_perplexity"] == pytest.approx(plain_perplexity(model, tokenizer), rel=1e-4)
    assert rows[1]["weights"]["rotation"] < rows[2]["weights"]["rotation"]
    table = format_table(rows)
    for text in ("text perpl.", "rotation", "||change||", f"{rows[2]['weights']['change_norm']:.2f}"):
        assert text in table


def test_they_are_measured_once_and_again_for_other_weights(setting, monkeypatch):
    summary, measured = evaluate(setting, counterfact(9)), []
    perplexity, change = state_metrics.text_perplexity, WeightChange.measure
    monkeypatch.setattr(
        state_metrics, "text_perplexity", lambda *args: measured.append("text") or perplexity(*args)
    )
    monkeypatch.setattr(WeightChange, "measure", lambda *args: measured.append("weights") or change(*args))
    assert evaluate(setting, counterfact(9)) == summary
    assert measured == []
    write_checkpoint(setting[2], 4, changed(setting[0], 0.3, seed=5))
    again = evaluate(setting, counterfact(9))
    assert measured == ["text", "weights"]
    assert again["checkpoints"][1]["text_perplexity"] != summary["checkpoints"][1]["text_perplexity"]
    assert again["checkpoints"][2] == summary["checkpoints"][2]


@pytest.mark.parametrize("content", ["{}", "[]", '{"weights": 3, "text_perplexity": {"key": 1}}'])
def test_a_file_without_them_is_written_anew(setting, content):
    summary = evaluate(setting, counterfact(9))
    (setting[2] / "summary" / "state_edit_4.json").write_text(content)
    assert evaluate(setting, counterfact(9)) == summary


def test_energies_that_were_logged_are_those_of_the_log(setting):
    line = {"n_edits": 9, "layers": {NAMES[0]: {"energy_change": 0.25}, NAMES[1]: {"energy_change": 0.75}}}
    (setting[2] / "batches.jsonl").write_text(json.dumps(line) + "\n")
    _, unlogged, logged = evaluate(setting, counterfact(9))["checkpoints"]
    assert logged["weights"]["energy_change"] == 0.5
    assert unlogged["weights"]["energy_change"] not in (None, 0.5)


def test_without_edit_0_the_model_is_the_reference(tmp_path):
    model = tiny_model()
    before = EditedWeights(model, NAMES).stored()
    torch.save({"weight": changed(model, 0.1)}, tmp_path / "edit_3.pth")
    _, row = evaluate((model, tiny_tokenizer(), tmp_path), counterfact(5))["checkpoints"]
    norms = [float((w - before[n]).norm()) for n, w in changed(model, 0.1).items()]
    assert row["weights"]["change_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)


def test_weights_that_the_model_stores_transposed_are_turned(tmp_path, tiny_tokenizer):
    model, name = tiny_gpt2(), "transformer.h.1.mlp.c_proj.weight"
    stored = EditedWeights(model, [name]).stored()
    torch.manual_seed(0)
    edited = {name: stored[name] + 0.1 * torch.randn_like(stored[name])}
    write_checkpoint(tmp_path, 0, stored)
    write_checkpoint(tmp_path, 2, edited)
    states = RunStates(model, tiny_tokenizer, tmp_path)
    assert states.original()[name].shape == (32, 128)
    found = WeightChange(states.original()).measure(states.canonical(states.checkpoints[0]))
    assert found["rotation"] == pytest.approx(plain_rotation(stored[name].T, edited[name].T), abs=1e-5)


def test_a_broken_model_has_no_perplexity(tmp_path):
    model = tiny_model()
    make_run(tmp_path, model, steps=(4,))
    write_checkpoint(tmp_path, 4, {n: torch.full_like(w, 3e38) for n, w in changed(model, 0).items()})
    summary = evaluate((model, tiny_tokenizer(), tmp_path), counterfact(9))
    assert summary["checkpoints"][1]["text_perplexity"] is None
    assert "-" in format_table(summary).splitlines()[-1]
