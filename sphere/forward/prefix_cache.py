"""Attention keys and values that stay as they are while what follows them changes. Knows nothing of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class FrozenPrefixCache(DynamicCache):
    """Attention keys and values of constant earlier positions; after `freeze`, new ones are seen but not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    def freeze(self) -> FrozenPrefixCache:
        """From now on what is put in is not kept."""
        self.frozen = True
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        prefix: Any = self.layers[layer_idx]
        return torch.cat([prefix.keys, key_states], dim=-2), torch.cat([prefix.values, value_states], dim=-2)

    def keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer: keys and values, (batch x heads x positions x head_dim) each."""
        layers: list[Any] = self.layers
        return [(layer.keys, layer.values) for layer in layers]
