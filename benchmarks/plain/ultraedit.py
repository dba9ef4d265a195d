"""UltraEdit's update the plain way: a fact at a time through the whole model, moments over a list of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain.tokens import with_target
from sphere.requests import EditRequest


def rows(
    model: Any, tokenizer: Any, module: nn.Module, requests: Sequence[EditRequest]
) -> tuple[Tensor, Tensor]:
    """h (N x in) and g (N x out), float64, at the positions that predict the answers' tokens."""
    h_rows, g_rows = [], []
    for request in requests:
        ids, start = with_target(tokenizer, request.text, request.target_new)
        seen: list[Tensor] = []

        def hook(_module: nn.Module, args: Any, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
            shifted = output.detach().clone().requires_grad_(True)
            seen.extend((args[0].detach(), shifted))
            return shifted

        handle = module.register_forward_hook(hook)
        with torch.enable_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :]  # answer's tokens x vocabulary
            loss = nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))
            (gradient,) = torch.autograd.grad(loss, seen[1])
        handle.remove()
        h_rows.append(seen[0][0, start - 1 :].double())
        g_rows.append(gradient[0, start - 1 :].double())
    return torch.cat(h_rows), torch.cat(g_rows)


def update(h: Tensor, g: Tensor, seen: Sequence[tuple[Tensor, Tensor]], lr: float, ridge: float) -> Tensor:
    """Delta (out x in) of a batch's rows h (N x in) and g (N x out), given all rows so far, these included."""
    all_h, all_g = torch.cat([part for part, _ in seen]), torch.cat([part for _, part in seen])
    total = torch.zeros(h.shape[1], g.shape[1]).double()  # H^T V: in x out
    for key, gradient in zip(h, g, strict=True):
        h_hat = (key - all_h.mean(0)) / all_h.std(0)
        g_hat = (gradient - all_g.mean(0)) / all_g.std(0)
        total += torch.outer(key, -lr * (h_hat @ h_hat) * g_hat)
    system = h.T @ h + ridge * torch.eye(h.shape[1]).double()
    return torch.linalg.solve(system, total).T
