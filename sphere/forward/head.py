"""Logits as a model itself makes them of what its layers put out: head, scaling, capping, whatever its forward does.

The model's own forward is run with a stand-in for its decoder, which hands over a given hidden state and computes
nothing. Knows transformers' causal language models; knows nothing of layers or positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sphere.errors import SphereError
from sphere.forward.modules import replaced_forward


class _HandedOver(BaseModelOutputWithPast):
    """A decoder's output with a last hidden state; whatever else a model asks it for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits_of(model: Any, decoders: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """The model's logits (... x vocabulary), in its own dtype, of what leaves its final norm (... x d).

    Args:
        decoders: modules around the model's layers. Whichever of them the model's forward calls hands `hidden` over.

    Raises:
        SphereError: the model's forward calls none of them.
    """
    calls: list[None] = []

    def hand_over(*_args: Any, **_kwargs: Any) -> _HandedOver:
        calls.append(None)
        return _HandedOver(last_hidden_state=flat)

    flat = hidden.reshape(1, -1, hidden.shape[-1])  # one row
    unread = torch.zeros(flat.shape[:2], dtype=torch.long, device=hidden.device)  # token ids
    with ExitStack() as replaced:
        for module in decoders:
            replaced.enter_context(replaced_forward(module, hand_over))
        logits = model(input_ids=unread, use_cache=False).logits
    if len(calls) != 1:
        raise SphereError(
            f"{type(model).__name__} does not make its logits of what one decoder around its layers gives, so that "
            "target values and fine-tuning cannot read them: choose a causal language model of transformers."
        )
    return logits.reshape(*hidden.shape[:-1], -1)
