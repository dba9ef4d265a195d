"""Target values of an anchored norm, beside the definition, where layers add an MLP's output as it is and elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_architectures import ARCHITECTURES, MORE, REQUESTS, tiny_editor, tiny_hparams, tiny_model
from tiny_run import method_values
from torch import Tensor

from benchmarks.plain import keys as plain
from sphere import Editor, SphereError, get_method, hparams_from_dict
from sphere.values.compute_z import TargetValues
from sphere.values.z_rescale import added, rescaled


def editor_of(folder: Path, **changes: Any) -> Editor:
    config, shipped = ARCHITECTURES["llama"]
    hparams = dataclasses.replace(tiny_hparams("NAS", shipped), **changes)
    return tiny_editor(tiny_model(config), "NAS", hparams, folder)


def module_outputs(editor: Editor, requests: list[Any]) -> Tensor:
    """v_0 (n x d) of the z layer, a request at a time through the whole model."""
    edited = editor.edited
    module = edited.module(max(edited.hparams.layers))
    return plain.outputs(edited.model, edited.tokenizer, module, requests).T


def test_z_has_the_norm_that_it_has_on_the_unedited_model(tmp_path: Path) -> None:
    editor, batches = editor_of(tmp_path), (REQUESTS, MORE)
    anchor = None
    for batch in batches:
        found, v_0 = editor.services.compute_z(batch), module_outputs(editor, batch)
        v_star = v_0 + found.z - found.h0
        anchor = v_star.norm(dim=1).mean() if anchor is None else anchor
        expected = found.h0 - v_0 + v_star * anchor / v_star.norm(dim=1, keepdim=True)
        torch.testing.assert_close(editor.method.target_values(batch).T, expected, rtol=1e-4, atol=1e-4)
        editor.edit(batch)


def test_what_is_too_large_is_not_edited() -> None:
    h0, delta = torch.randn(4, 8), torch.randn(4, 8)
    v_0 = torch.zeros(4, 8)
    norms = torch.tensor([0.5, 1.0, 1.9, 2.1])
    delta = delta / delta.norm(dim=1, keepdim=True) * norms[:, None]
    values = TargetValues(h0 + delta, h0, torch.zeros(4), torch.ones(4))
    moved = (rescaled(values, v_0, torch.tensor(1.0)) - h0).norm(dim=1)
    torch.testing.assert_close(moved, torch.tensor([1.0, 1.0, 1.0, 0.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_behind_a_factor_or_a_norm_it_is_what_reaches_the_stream(family: str, tmp_path: Path) -> None:
    """The layer's output with the module's as it is, less the one with the module's output zero."""
    one = FAMILIES[family]
    editor = tiny_editor(one.model(), "AlphaEdit", one.hparams("AlphaEdit"), tmp_path)
    edited, layer = editor.edited, max(editor.edited.hparams.layers)
    found = added(editor.services.bare_pass(REQUESTS), layer)
    of_layer = edited.stack.layers[layer]
    whole = plain.outputs(edited.model, edited.tokenizer, of_layer, REQUESTS).T
    handle = edited.module(layer).register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    without = plain.outputs(edited.model, edited.tokenizer, of_layer, REQUESTS).T
    handle.remove()
    torch.testing.assert_close(found, whole - without, rtol=1e-3, atol=1e-4)


def test_the_anchor_is_kept_and_forgotten_with_its_batch(tmp_path: Path) -> None:
    editor = editor_of(tmp_path)

    def measure(*_args: object) -> dict[str, float]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        editor.edit(REQUESTS, measure)
    assert not editor.method.state()
    editor.edit(REQUESTS)
    assert "z_anchor" in editor.method.state()
    editor.revert()
    assert not editor.method.state()


@pytest.mark.parametrize(("method", "value"), [("NAS", False), ("ROME", True)])
def test_where_it_has_no_meaning_it_is_refused(method: str, value: bool) -> None:
    with pytest.raises(SphereError, match="z_rescale must be"):
        hparams_from_dict(method_values(method, z_rescale=value), get_method(method).hparams_class)
