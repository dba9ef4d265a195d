"""Whether a model can be edited, asked of the model itself before anything is done with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sphere.errors import SphereError
from sphere.forward.modules import hidden_of, inference

PROBE_TOKENS = 3  # of the pass that shows whether logits are the model's own


def check_matrix(model: nn.Module, path: str) -> None:
    """Refuse to edit what holds the weights of several experts in one tensor.

    Raises:
        SphereError: there is no matrix at `path`, but a tensor of more dimensions.
    """
    parent, _, leaf = path.rpartition(".")
    with suppress(AttributeError):
        found = getattr(model.get_submodule(parent), leaf)
        held = [found] if isinstance(found, Tensor) else list(found.parameters(recurse=False))
        if held and all(tensor.ndim > 2 for tensor in held):
            shape = " x ".join(map(str, held[-1].shape))
            raise SphereError(
                f"'{path}' of {type(model).__name__} holds the weights of all experts in one tensor ({shape}), and a "
                "token meets a few of them: let rewrite_module_tmp name a matrix that every token goes through, such "
                "as a shared expert's, or choose layers without experts."
            )


@torch.no_grad()
def check_logits(model: Any, top: nn.Module, logits: Callable[[Tensor], Tensor], ln_f_module: str) -> None:
    """One short pass: does `logits` give the model's own logits from what its top layer puts out?

    Args:
        logits: (1 x positions x d) -> (1 x positions x vocabulary).
        ln_f_module: what the hyperparameters call the final norm.

    Raises:
        SphereError: it does not, since more stands between the two than a final norm and the head, or another norm.
    """
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(PROBE_TOKENS, device=embedding.device)[None] % len(embedding)
    leaving: list[Tensor] = []
    found: Tensor | None = None
    handle = top.register_forward_hook(lambda _module, _args, output: leaving.append(hidden_of(output)))
    try:
        with inference(model):
            expected = model(input_ids=ids, use_cache=False).logits.float()
            with suppress(RuntimeError):  # the head takes other widths
                found = logits(leaving[0]).to(expected.device)
    finally:
        handle.remove()
    if found is None or not alike(found, expected, leaving[0].dtype):
        raise SphereError(
            f"'{ln_f_module}' and the head of {type(model).__name__} do not give its logits from what its last layer "
            "puts out: correct ln_f_module in the hyperparameter file, or choose another model."
        )


def alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to compute the same in `dtype` differ by rounding only; a broken model's NaN are alike."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-3 if torch.finfo(dtype).bits >= 32 else 0.05
    difference = (found - expected).nan_to_num().norm()
    return bool(difference <= tolerance * expected.nan_to_num().norm())
