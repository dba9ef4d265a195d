"""What is done to a module for the length of a block. Knows modules; knows nothing of what they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a decoder layer's output, be it a tensor or a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for the model's own parameters, for the length of the block."""
    training = model.training
    required = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in required:
            parameter.requires_grad_(True)


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block `module` computes `forward`; its hooks, and what others put around it, stay."""
    own = vars(module).get("forward")  # as a device map gives it to modules
    module.forward = forward
    try:
        yield
    finally:
        if own is not None:
            module.forward = own
        else:
            del module.forward


@contextmanager
def only_at(module: nn.Module | None, row: Tensor, position: Tensor) -> Iterator[None]:
    """Within the block `module` computes (batch x positions x d) inputs at (row, position) only; elsewhere it gives 0.

    For a module that treats positions alike and whose output matters only there, such as the top layer's MLP. Modules
    that are called in any other way run as they are.

    Args:
        row, position: (n,) each.
    """
    if module is None:
        yield
        return

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        shapes.append(args[0].shape if args and isinstance(args[0], Tensor) and args[0].ndim == 3 else None)
        if shapes[-1] is None:
            return None
        return (args[0][row.to(args[0].device), position.to(args[0].device)][None], *args[1:])

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        shape, found = shapes.pop(), hidden_of(output)
        if shape is None:
            return None
        whole = found.new_zeros(*shape[:2], found.shape[-1])
        whole = whole.index_put((row.to(found.device), position.to(found.device)), found[0])
        return whole if isinstance(output, Tensor) else type(output)([whole, *output[1:]])

    shapes: list[torch.Size | None] = []
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
