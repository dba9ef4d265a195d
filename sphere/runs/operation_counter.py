"""What a model computes and what it keeps for a gradient, counted on the meta device: shapes without values.

So nothing here knows an architecture: whatever runs is counted as it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sphere.forward.layers import LayerStack
from sphere.forward.modules import inference

PROBE_ROWS, PROBE_WIDTH = 32, 5  # rows and positions of the pass that is counted


@dataclass(frozen=True)
class Counted:
    """What parts of a model take per token.

    Attributes:
        forward, backward: operations of the layers that a gradient runs through.
        saved: bytes that the gradient needs.
        below: operations of the layers below.
        kv: bytes of attention keys and values, of all layers.
        head: operations per scored token of the final norm and the head.
        layers: number of layers that the gradient runs through.
    """

    forward: float
    backward: float
    saved: float
    below: float
    kv: float
    head: float
    layers: int


def _inputs(stack: LayerStack, rows: int, width: int) -> dict[str, Any]:
    """Arguments of the model on the meta device; a mask of four dimensions is taken as it is, without a look inside."""
    dtype = next(stack.model.parameters()).dtype
    return {
        "input_ids": torch.zeros(rows, width, dtype=torch.long, device="meta"),
        "attention_mask": torch.zeros(rows, 1, width, width, dtype=dtype, device="meta"),
        "position_ids": torch.zeros(rows, width, dtype=torch.long, device="meta"),
        "use_cache": False,
    }


def edited_shapes(stack: LayerStack) -> tuple[tuple[int, int], ...]:
    """(out, in) of each edited weight: in is what enters its module."""
    shapes = []
    for layer, entering in sorted(stack.module_inputs(_inputs(stack, 1, 2)).items()):
        weight: Any = stack.rewrite[layer].weight
        shapes.append((weight.numel() // entering.shape[-1], entering.shape[-1]))
    return tuple(shapes)


def count(stack: LayerStack, first: int, last: int) -> Counted:
    """One pass as the optimisation of z makes it: layers first..last with their gradient, measured at one position."""
    tokens = PROBE_ROWS * PROBE_WIDTH
    inputs = _inputs(stack, PROBE_ROWS, PROBE_WIDTH)
    cache = stack.fill_cache(inputs).keys_and_values()
    kv = sum(part.nbytes for pair in cache for part in pair) / tokens
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stack.record(inputs, first, first)
        below = counter.get_total_flops()
        recording = stack.record(inputs, first, last)
    row = torch.arange(PROBE_ROWS, device="meta")
    with inference(stack.model), FlopCounterMode(display=False) as counter, _Saved(stack.model) as saved:
        hidden = recording.hidden.clone().requires_grad_(True)
        points = stack.run_at(recording, hidden, first, last, row, torch.zeros_like(row))
        forward, kept = counter.get_total_flops(), saved.size
        points.sum().backward()
        backward = counter.get_total_flops() - forward
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stack.logits(points.detach())
    return Counted(
        forward=forward / tokens,
        backward=backward / tokens,
        saved=kept / tokens,
        below=below / tokens,
        kv=kv,
        head=counter.get_total_flops() / PROBE_ROWS,
        layers=max(last - first + 1, 1),
    )


class _Saved:
    """Within the block: the bytes of what is saved for the gradient, the model's own parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self._seen: dict[int, Any] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return sum(storage.nbytes() for storage in self._seen.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._seen[storage._cdata] = storage
        return tensor

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
