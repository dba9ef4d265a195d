"""The gradient of an edit's loss as rank-one factors: dL/dW = sum over tokens of delta_t u_t^T (MEND, section 3).

Knows layers and losses. Knows nothing of the networks that edit the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.forward.layers import LayerStack
from sphere.methods.module_gradients import module_gradients
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

    Returns:
        layer -> Factors, float32 or wider.
    """
    found = module_gradients(batch, stack)
    return {layer: _kept(inputs, gradients, batch.mask) for layer, (inputs, gradients) in found.items()}


def _kept(inputs: Tensor, gradients: Tensor, mask: Tensor) -> Factors:
    """Flatten (rows x positions x features) to the tokens that count."""
    reach = mask.to(gradients.device) & (gradients != 0).any(dim=-1)  # rows x positions
    wide = torch.promote_types(inputs.dtype, torch.float32)
    return Factors(inputs[reach.to(inputs.device)].to(wide), gradients[reach].to(wide))
