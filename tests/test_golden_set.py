"""Parity with the golden set in tests/golden: two batches of eight methods on a tiny model, made by plain code.

Nothing recorded is fed in but the second moments: target values and keys are the editor's own, on weights that it has
edited itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from golden.build import HERE, RUNS, build, load, stored
from torch import Tensor

from sphere import Editor, EditRequest, get_method, hparams_from_dict
from sphere.forward.layers import LayerStack
from sphere.methods.memit import MEMIT
from sphere.values.layer_stats import layer_stats

# Relative errors (Frobenius) of float32 against the plain float64. The largest that were seen: 2e-6 and 5e-6.
VALUES = 1e-5  # of z and of keys
CHANGES = 3e-5  # of weight changes
LARGEST = 2_000_000  # bytes, of the whole set

Golden = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return stored()


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def editor_of(golden: Golden, name: str) -> Editor:
    """An editor of the unedited model in float32, with the settings of a run."""
    content, tensors = golden
    run, (model, tokenizer) = content["runs"][name], load(HERE / "model", torch.float32)
    method = get_method(run["alg"])
    known = {f.name for f in fields(method.hparams_class)}
    editor = Editor(
        model,
        tokenizer,
        run["alg"],
        hparams_from_dict({k: v for k, v in content["hparams"].items() if k in known}, method.hparams_class),
        beta_hse=run["beta_hse"],
        alpha=run["alpha"],
        context_templates=content["context_templates"],
        progress=False,
    )
    for layer in content["hparams"]["layers"]:
        editor.services.second_moments.set(layer, tensors[f"moment.{layer}"])
    return editor


class Watched:
    """Keys and outputs as the services give them; the first keys of each layer are noted."""

    def __init__(self, activations: Any, noted: dict[str, Tensor]) -> None:
        self.activations, self.noted = activations, noted
        self.outputs, self.restart = activations.outputs, activations.restart

    def compute_ks(self, layer: int) -> Tensor:
        keys = self.activations.compute_ks(layer)
        self.noted.setdefault(f"keys.{layer}", keys)
        return keys


def watch(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A dictionary into which z (n x d) and keys (in x n) go as the editor finds them."""
    noted: dict[str, Tensor] = {}
    compute_z: Callable[..., Any] = editor.services.compute_z
    activations: Callable[..., Any] = editor.services.activations

    def watched_z(*args: Any, **options: Any) -> Any:
        values = compute_z(*args, **options)
        noted["z"] = values.z
        return values

    monkeypatch.setattr(editor.services, "compute_z", watched_z)
    monkeypatch.setattr(editor.services, "activations", lambda *args: Watched(activations(*args), noted))
    return noted


@pytest.mark.parametrize("name", RUNS)
def test_z_keys_and_weight_changes(name: str, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    content, tensors = golden
    layers, run = content["hparams"]["layers"], content["runs"][name]
    requests = [EditRequest(**request) for request in content["requests"]]
    editor, ranks = editor_of(golden, name), []
    noted = watch(editor, monkeypatch)
    for number, batch in enumerate(content["batches"]):
        noted.clear()
        before = {layer: editor.edited.weight(layer).clone() for layer in layers}
        report = editor.edit([requests[i] for i in batch])
        ranks += [metrics["rank"] for metrics in report.layers.values() if "rank" in metrics]
        assert noted.keys() == {"z", *(f"keys.{layer}" for layer in layers)}
        for what, found in noted.items():
            assert relative(found, tensors[f"{name}.batch{number}.{what}"]) < VALUES, (
                f"batch {number}, {what}"
            )
        for layer in layers:
            change = editor.edited.weight(layer) - before[layer]
            expected = tensors[f"{name}.batch{number}.delta.{layer}"]
            assert relative(change, expected) < CHANGES, f"batch {number}, layer {layer}"
    if "condensed" not in run:
        assert ranks == run["ranks"]


def test_what_prune_saves(golden: Golden) -> None:
    content, tensors = golden
    run, editor = content["runs"]["prune_sphere"], editor_of(golden, "prune_sphere")
    requests = [EditRequest(**request) for request in content["requests"]]
    noted: list[dict[str, float]] = []

    def measure(_name: str, _after: Tensor, _before: Tensor, metrics: dict[str, float]) -> dict[str, Any]:
        noted.append(dict(metrics))
        return {}

    for batch in content["batches"]:
        editor.edit([requests[i] for i in batch], measure)
    saved, layers = editor.final_weights(), content["hparams"]["layers"]
    for layer in layers:
        weight = editor.edited.weight_name(layer)
        expected = tensors[f"prune_sphere.conditioned.{layer}"]
        assert relative(saved[weight] - editor.original[weight], expected) < CHANGES
    assert [metrics["condensed"] for metrics in noted[-len(layers) :]] == run["condensed"]
    assert [metrics["rank"] for metrics in noted[-len(layers) :]] == run["ranks"]
    assert min(run["condensed"]) > 0


def test_second_moments(golden: Golden) -> None:
    content, tensors = golden
    model, tokenizer = load(HERE / "model", torch.float32)
    known = {f.name for f in fields(MEMIT.hparams_class)}
    values = {k: v for k, v in content["hparams"].items() if k in known}
    stack = LayerStack(model, hparams_from_dict(values, MEMIT.hparams_class))
    found, _ = layer_stats(
        stack, [tokenizer(text)["input_ids"] for text in content["documents"]], batch_tokens=200
    )
    for layer, moment in found.items():
        assert relative(moment, tensors[f"moment.{layer}"]) < VALUES


def test_the_set_is_what_its_script_builds(golden: Golden) -> None:
    """A changed setting or plain path needs a new set: python tests/golden/build.py."""
    content, tensors = build(HERE / "model")
    assert content == golden[0]
    assert tensors.keys() == golden[1].keys()
    for name, tensor in tensors.items():
        assert relative(tensor, golden[1][name]) < 1e-5, name


def test_the_set_stays_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".pyc") < LARGEST
