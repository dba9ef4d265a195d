"""Weights under edit: orientation, exact undo, and small updates that bfloat16 alone would lose."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import GPT2_MODULES, tiny_gpt2, tiny_hparams, tiny_llama
from torch import nn

from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.weights import EditedWeights

NAME = "model.layers.1.mlp.down_proj.weight"
UPDATES = 2000


def small_updates(weight: torch.Tensor) -> torch.Tensor:
    """An update below half of bfloat16's spacing at almost every entry of `weight` (out x in)."""
    return weight.sign() * weight.abs().clamp(min=1e-3) * 2**-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thousands_of_small_updates_survive_half_precision(dtype):
    model = tiny_llama().to(dtype)
    weights = EditedWeights(model, [NAME])
    before = weights.get(NAME).clone()
    update = small_updates(before) / (1 if dtype == torch.bfloat16 else 8)
    wanted = before + UPDATES * update.double()
    # what adding to the model's own tensor does: nearly everything is rounded away
    alone = before.to(dtype)
    for _ in range(UPDATES):
        alone += update.to(dtype)
        weights.add_(NAME, update)

    def lost(weight: torch.Tensor) -> float:
        return float((wanted - weight.double()).norm() / (wanted - before.double()).norm())

    assert lost(alone) > 0.95
    assert lost(weights.get(NAME)) < 1e-3
    # and the model computes with the master's value, rounded once
    model_weight = model.get_parameter(NAME)
    assert model_weight.dtype == dtype
    assert torch.equal(model_weight, weights.get(NAME).to(dtype))
    assert lost(model_weight) < 0.02


def test_random_small_updates_in_bfloat16_keep_their_sum():
    """Random directions, as real updates are: rounding each step loses their sum, the master keeps it."""
    weights = EditedWeights(tiny_llama().bfloat16(), [NAME])
    before = weights.get(NAME).clone()
    alone, total = before.bfloat16(), torch.zeros_like(before, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(before.shape, generator=generator) * 2e-5
    for _ in range(UPDATES):
        update = drift + 2e-5 * torch.randn(before.shape, generator=generator)
        alone += update.bfloat16()
        weights.add_(NAME, update)
        total += update
    with_master = (weights.get(NAME) - before - total).norm() / total.norm()
    without = (alone.float() - before - total).norm() / total.norm()
    assert with_master < 1e-3
    assert without > 0.3


def test_a_float32_weight_has_no_second_copy():
    model = tiny_llama()
    weights = EditedWeights(model, [NAME])
    assert weights.get(NAME).data_ptr() == model.get_parameter(NAME).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshot_and_restore_are_exact(dtype):
    model = tiny_llama().to(dtype)
    weights = EditedWeights(model, [NAME])
    weights.add_(NAME, torch.full(weights.get(NAME).shape, 1e-6))
    snapshot, stored = weights.snapshot(), weights.stored()
    with weights.temporarily():
        weights.set_(NAME, torch.zeros(weights.get(NAME).shape))
        assert not model.get_parameter(NAME).any()
    assert torch.equal(weights.snapshot()[NAME], snapshot[NAME])
    assert torch.equal(weights.stored()[NAME], stored[NAME])
    assert snapshot[NAME].dtype == torch.float32


def test_conv1d_is_turned():
    model = tiny_gpt2()
    hparams = tiny_hparams(GPT2_MODULES)
    name = LayerStack(model, hparams).weight_name(1)
    weights = EditedWeights(model, [name])
    parameter = model.get_parameter(name)  # Conv1D: in x out
    before = parameter.clone()
    delta = torch.randn(tuple(reversed(parameter.shape)))  # out x in
    weights.add_(name, delta)
    assert torch.allclose(parameter - before, delta.T)
    assert torch.equal(weights.canonical(name, parameter), weights.get(name))


def test_what_is_no_weight_is_named():
    model = tiny_llama()
    with pytest.raises(SphereError, match=r"has no weight 'model\.layers\.99.*check rewrite_module_tmp"):
        EditedWeights(model, ["model.layers.99.mlp.down_proj.weight"])
    with pytest.raises(SphereError, match="not a weight matrix"):
        EditedWeights(model, ["model.norm.weight"])
    weights = EditedWeights(model, [NAME])
    with pytest.raises(SphereError, match=r"shape \(1, 2\)"):
        weights.add_(NAME, torch.zeros(1, 2))
    with pytest.raises(SphereError, match="do not fit this model"):
        weights.restore({NAME: torch.zeros(3, 3)})


def test_a_weight_that_is_nowhere_is_refused():
    """Offloaded to disk, or made on the meta device: there are no numbers to change."""
    model: nn.Module = copy.deepcopy(tiny_llama())
    model.get_submodule("model.layers.1.mlp.down_proj").to("meta")
    with pytest.raises(SphereError, match=r"meta device.*device_map"):
        EditedWeights(model, [NAME])
