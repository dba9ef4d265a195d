"""What modules must add, the plain way: whole forward passes, dense Jacobians, pseudoinverses, one request at a time.

The same mathematics as `sphere.values.module_residual`: of all changes of the modules' outputs, the least with which
the layers' outputs change together by what is asked, or come as near to it as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

STEPS = 15
REACHED = 1e-3  # fraction of the target that may be missing


def remaining_part(model: Any, layer: nn.Module, module: nn.Module, ids: Sequence[int]) -> tuple[Any, Tensor]:
    """f, from a module's output (out,) at the last of some token ids to its layer's (d,) there, and its u now."""
    tokens = torch.tensor([list(ids)], device=model.device)

    def f(u: Tensor | None, seen: list[Tensor] | None = None) -> Tensor:
        found: list[Tensor] = []

        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if seen is not None:
                seen.append(output[0, -1].detach())
            return None if u is None else torch.cat([output[:, :-1], u.to(output)[None, None]], dim=1)

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append((output if isinstance(output, Tensor) else output[0])[0, -1])

        handles = [module.register_forward_hook(replace), layer.register_forward_hook(keep)]
        try:
            model(tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found[0]

    now: list[Tensor] = []
    with torch.no_grad():
        f(None, now)
    return f, now[0]


def least_change(
    parts: Sequence[tuple[Callable[..., Tensor], Tensor]], target: Tensor
) -> tuple[Tensor, Tensor]:
    """The least change of the modules' outputs (L x out) that brings sum_l f_l(u_l + e_l) - f_l(u_l) next to a target.

    Layers are weighed by c_l = ||J_l||_F / sqrt(d): c_l e_l is least. Gauss-Newton by pseudoinverses, a step halved
    until it helps. Directions of less than 1e-3 of the largest singular value do not count.

    Args:
        parts: f_l and u_l of each layer.
        target: (d,).

    Returns:
        The change, and what is missing of the target (d,).
    """
    starts = [f(u).detach() for f, u in parts]
    gains = [float(jacobian(f, u).norm()) / len(target) ** 0.5 for f, u in parts]

    def changed(e: Tensor) -> Tensor:
        own = zip(parts, e, gains, starts, strict=True)
        return torch.stack([f(u + change / c) - start for (f, u), change, c, start in own]).sum(0)

    e = torch.zeros(len(parts), len(parts[0][1]))
    missing = target
    for _ in range(STEPS):
        inverse = torch.linalg.pinv(jacobian(changed, e).flatten(1), rtol=1e-3)  # (L out) x d
        step = (inverse @ missing).reshape(e.shape)
        length = 1.0
        while length > 1e-3 and (target - changed(e + length * step)).norm() >= missing.norm():
            length /= 2
        if length <= 1e-3 or missing.norm() < REACHED * target.norm():
            break
        e = e + length * step
        missing = (target - changed(e)).detach()
    return e / torch.tensor(gains)[:, None], missing
