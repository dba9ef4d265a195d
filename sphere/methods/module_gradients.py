"""What the edited modules are given, and the gradient of the targets' likelihood at what they put out.

The gradient of a weight is a sum over tokens of rank-one factors, dL/dW = sum_t g_t h_t^T, which one backward pass
gives for all layers. Knows layers and losses. Knows nothing of what is made of the factors (MEND, UltraEdit).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sphere.forward.layers import LayerStack
from sphere.forward.modules import by_position, inference
from sphere.methods.teacher_forcing import TeacherForcing


class ModuleGradients(NamedTuple):
    """Of one edited module.

    Attributes:
        inputs: h (rows x positions x in).
        gradients: g (rows x positions x out), of the loss at the module's output.
    """

    inputs: Tensor
    gradients: Tensor


def module_gradients(batch: TeacherForcing, stack: LayerStack) -> dict[int, ModuleGradients]:
    """h and g of every edited layer for the loss: mean negative log-likelihood of a row's target, summed over rows.

    The gradient of a module's output is that of a shift added to it, so one backward pass gives them all.

    Returns:
        layer -> h and g, in the model's dtype.
    """
    with inference(stack.model), torch.enable_grad(), ExitStack() as hooks:
        shape = batch.recording.hidden.shape[:2]
        inputs: dict[int, Tensor] = {}
        shifts: dict[int, Tensor] = {}  # rows x positions x out each
        for layer, module in stack.rewrite.items():
            like: Any = module.weight
            shifts[layer] = like.new_zeros(*shape, _out_features(module)).requires_grad_(True)
            hook = _shifting(layer, stack.hparams.rewrite_module_tmp.format(layer), shifts[layer], inputs)
            hooks.callback(module.register_forward_hook(hook).remove)
        batch.nll().sum().backward()
    return {layer: ModuleGradients(inputs[layer].detach(), _grad(shift)) for layer, shift in shifts.items()}


def _grad(shift: Tensor) -> Tensor:
    return torch.zeros_like(shift) if shift.grad is None else shift.grad


def _shifting(layer: int, path: str, shift: Tensor, inputs: dict[int, Tensor]) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs[layer] = by_position(args[0], shift.shape[:2], path)
        return output + shift.to(output).reshape(output.shape)

    return hook


def _out_features(module: nn.Module) -> int:
    """Width of a module's output, whichever way round its weight is stored."""
    with torch.no_grad():
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        if bias is not None:
            return bias.shape[0]
        in_features = getattr(module, "in_features", weight.shape[1])
        return module(weight.new_zeros(1, in_features)).shape[-1]
