"""A model under edit: the model, where its layers are, and the weights that change.

Knows one model. Knows nothing of requests, statistics or methods (`sphere.methods.services`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.fingerprint import Fingerprint
from sphere.forward.layers import LayerStack
from sphere.hparams import ModuleHParams
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.weights import EditedWeights


@dataclass
class EditedModel:
    """A model under edit.

    Attributes:
        hparams: they name its modules and the edited layers.
        user_turn: what its prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).
        stack: its layers, to run parts of it.
        weights: the edited layers' weights.
        original: what they were when `keep_original` was called, by name, in the model's own orientation.
        fingerprint: of all of its weights as they stand.

    Raises:
        SphereError: hyperparameters that do not fit the model, or weights that another live editor holds.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hparams: ModuleHParams
    user_turn: str = BARE
    stack: LayerStack = field(init=False)
    weights: EditedWeights = field(init=False)
    original: dict[str, Tensor] = field(init=False, default_factory=dict)
    fingerprint: Fingerprint = field(init=False)

    def __post_init__(self) -> None:
        self.stack = LayerStack(self.model, self.hparams)
        self.weights = EditedWeights(self.model, [self.stack.weight_name(i) for i in self.hparams.layers])
        self.fingerprint = Fingerprint(self.model, self.weights.names)

    def keep_original(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Keep a copy of the weights as they stand, on a device (None: where each is), as the original ones."""
        self.original = self.weights.snapshot(device)
        return self.original

    def asked(self, prompt: str) -> str:
        """A prompt, or a context template, as the model is given it: in the user's turn."""
        return in_turn(self.user_turn, prompt)

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.stack.device

    def layer_device(self, layer: int) -> torch.device:
        """Where an edited layer's weight is."""
        return self.stack.devices[layer]

    def module(self, layer: int) -> nn.Module:
        """The edited module of a layer (the MLP's last projection)."""
        return self.stack.rewrite[layer]

    def weight_name(self, layer: int) -> str:
        """Parameter name of an edited layer's weight."""
        return self.stack.weight_name(layer)

    def weight(self, layer: int) -> Tensor:
        """An edited layer's weight (out x in), float32 or wider: a view for reading."""
        return self.weights.get(self.weight_name(layer))

    def original_weight(self, layer: int) -> Tensor:
        """An edited layer's original weight (out x in), a view for reading, where and as it is kept."""
        name = self.weight_name(layer)
        return self.weights.canonical(name, self.original[name])
