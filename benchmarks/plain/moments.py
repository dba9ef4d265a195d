"""Second moments the plain way: one layer per pass over the corpus, one document at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Leaves a forward pass at the module whose input was wanted."""


@torch.no_grad()
def second_moment(model: Any, module: nn.Module, documents: Sequence[Sequence[int]]) -> Tensor:
    """E[k k^T] (in x in) float64 of a module's input k over all tokens; nothing above the module is run."""
    total: Tensor | None = None
    seen: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).float())  # tokens x in
        raise _Stop

    handle = module.register_forward_pre_hook(before)
    try:
        for ids in documents:
            with suppress(_Stop):
                model(torch.tensor([list(ids)], device=model.device), use_cache=False)
            k = seen.pop()
            block = (k.T @ k).double()
            total = block if total is None else total + block
    finally:
        handle.remove()
    assert total is not None
    return total / sum(map(len, documents))
