"""What is done to a module for the length of a block. Knows modules; knows nothing of what they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sphere.errors import SphereError


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
def passed_on(layers: Sequence[nn.Module], form: Sequence[Any]) -> Iterator[None]:
    """Within the block these layers compute nothing: each gives what enters it, in the form of a layer's output.

    Args:
        form: holds an output of another layer, a tensor or a tuple, by the time that these are called.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(form[-1], Tensor) else type(form[-1])([hidden, *form[-1][1:]])

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, forward))
        yield


@contextmanager
def only_at(module: nn.Module | None, row: Tensor, position: Tensor, shape: torch.Size) -> Iterator[None]:
    """Within the block `module` computes at (row, position) only; elsewhere it gives 0.

    Whatever it is given by row and position, (batch x positions x ...), is cut; a call without such an argument runs as
    it is. For a module that treats positions alike, whose output matters only there, such as the top layer's MLP.

    Args:
        row, position: (n,) each.
        shape: (batch, positions).
    """
    if module is None:
        yield
        return

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        was_cut[-1] = True
        return value[row.to(value.device), position.to(value.device)][None]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        was_cut.append(False)
        return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not was_cut.pop():
            return None
        found = hidden_of(output)
        whole = found.new_zeros(*shape, found.shape[-1])
        whole = whole.index_put((row.to(found.device), position.to(found.device)), found[0])
        return whole if isinstance(output, Tensor) else type(output)([whole, *output[1:]])

    was_cut: list[bool] = []  # of the calls that are being computed
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_position(x: Tensor, shape: torch.Size, module: str) -> Tensor:
    """What enters a module, (batch x positions x in), be it flattened to (tokens x in) or not.

    Args:
        shape: (batch, positions).
        module: its path in the model, for the message.

    Raises:
        SphereError: it is not computed once for each position.
    """
    if x.shape[:-1].numel() != shape.numel():
        raise SphereError(
            f"'{module}' was given {x.shape[:-1].numel()} vectors for {shape.numel()} tokens (an expert that some of "
            "them are routed to?): edit a module that every token goes through; correct rewrite_module_tmp."
        )
    return x.reshape(*shape, x.shape[-1])
