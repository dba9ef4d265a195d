"""Keys and layer outputs the plain way: each request in each template by a full forward pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain.tokens import to_subject
from sphere.requests import EditRequest


def _tokens(x: Tensor) -> Tensor:
    """(1 x positions x features), or what a model made of it, as (positions x features)."""
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def last_input(model: Any, module: nn.Module, ids: Sequence[int]) -> Tensor:
    """The input (in,) of a module at the last of some token ids."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(_tokens(args[0])[-1]))
    try:
        model(torch.tensor([list(ids)], device=model.device))
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def last_output(model: Any, module: nn.Module, ids: Sequence[int]) -> Tensor:
    """The output (out,) of a module, or the first of its outputs, at the last of some token ids."""
    seen: list[Tensor] = []

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(_tokens(output if isinstance(output, Tensor) else output[0])[-1])

    handle = module.register_forward_hook(after)
    try:
        model(torch.tensor([list(ids)], device=model.device))
    finally:
        handle.remove()
    return seen[0]


def keys(
    model: Any,
    tokenizer: Any,
    module: nn.Module,
    requests: Sequence[EditRequest],
    templates: Sequence[Sequence[str]],
) -> Tensor:
    """K (in x n): the input of `module` at the subject's last token, averaged in each group, then over groups."""
    columns = []
    for request in requests:
        groups = [
            torch.stack([last_input(model, module, to_subject(tokenizer, t, request)[1]) for t in group])
            for group in templates
        ]
        columns.append(torch.stack([group.mean(0) for group in groups]).mean(0))
    return torch.stack(columns, dim=1)


def outputs(model: Any, tokenizer: Any, layer: nn.Module, requests: Sequence[EditRequest]) -> Tensor:
    """(out x n): the output of `layer` at the subject's last token of the bare prompts."""
    return torch.stack(
        [last_output(model, layer, to_subject(tokenizer, "{}", request)[1]) for request in requests], dim=1
    )
