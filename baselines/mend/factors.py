"""The gradient of an edit's loss as rank-one factors: dL/dW = sum over tokens of delta_t u_t^T (MEND, section 3).

Knows layers and losses. Knows nothing of the networks that edit the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from sphere.forward.layers import LayerStack
from sphere.forward.modules import by_position, inference
from sphere.methods.teacher_forcing import TeacherForcing


@dataclass(frozen=True)
class Factors:
    """The gradient of one weight, token by token; tokens that do not reach the loss are left out.

    Attributes:
        inputs: u (tokens x in), what the edited module was given.
        gradients: delta (tokens x out), the loss's gradient of the module's output.
    """

    inputs: Tensor
    gradients: Tensor

    def weight_gradient(self) -> Tensor:
        """dL/dW (out x in)."""
        return self.gradients.T @ self.inputs


def rank_one_factors(batch: TeacherForcing, stack: LayerStack) -> dict[int, Factors]:
    """Factors of every edited layer for the loss: mean negative log-likelihood of a row's target, summed over rows.

    The gradient of a module's output is that of a shift added to it, so one vector-Jacobian product gives them all.

    Returns:
        layer -> Factors, float32 or wider.
    """
    with inference(stack.model):
        recording = batch.recording
        shifts = {
            layer: recording.hidden.new_zeros(*recording.hidden.shape[:2], _out_features(module))
            for layer, module in stack.rewrite.items()
        }  # rows x positions x out each

        def loss(shifts: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
            inputs: dict[int, Tensor] = {}
            with ExitStack() as hooks:
                for layer, module in stack.rewrite.items():
                    hook = _shifting(
                        layer, stack.hparams.rewrite_module_tmp.format(layer), shifts[layer], inputs
                    )
                    hooks.callback(module.register_forward_hook(hook).remove)
                return batch.nll().sum(), inputs

        value, pull, inputs = vjp(loss, shifts, has_aux=True)
        (gradients,) = pull(torch.ones_like(value))
    return {layer: _kept(inputs[layer], gradients[layer], batch.mask) for layer in stack.rewrite}


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


def _kept(inputs: Tensor, gradients: Tensor, mask: Tensor) -> Factors:
    """Flatten (rows x positions x features) to the tokens that count."""
    reach = mask.to(gradients.device) & (gradients != 0).any(dim=-1)  # rows x positions
    wide = torch.promote_types(inputs.dtype, torch.float32)
    return Factors(inputs.detach()[reach.to(inputs.device)].to(wide), gradients.detach()[reach].to(wide))
