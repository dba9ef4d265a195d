"""The remaining part f of a decoder layer: from the output u of one of its modules to the layer's output, at positions.

In Llama or GPT-2 the MLP's output is added to the residual stream as it is, f(u) = r + u. Other layers scale it
(Granite, f(u) = r + m u) or let it pass a norm first (Gemma 2 and 3, OLMo 2, GLM 4, f(u) = r + g * u / rms(u)). f is
the recorded call of the layer with the module's output replaced at those positions, so that no norm need be known by
name. Each position's output must depend on its own u alone, as behind an MLP. What is differentiated here is called
within `sphere.forward.modules.inference`: by u alone. Knows nothing of editing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sphere.forward.layers import LayerStack, RecordedCalls
from sphere.forward.modules import inference

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lookups:
    """Positions in a batch of rows that has got up to a layer.

    Attributes:
        recorded: how the layer is called.
        hidden: (rows x columns x d) entering it.
        row, column: (s,) each, no pair twice.
    """

    recorded: RecordedCalls
    hidden: Tensor
    row: Tensor
    column: Tensor


class RemainingPart:
    """f of one layer at S positions, which may lie in several batches: (S x out) -> (S x d), float32 or wider.

    Args:
        layer: one of the edited ones; the module is its edited one.
    """

    def __init__(self, stack: LayerStack, layer: int, lookups: Sequence[Lookups]) -> None:
        self.stack, self.layer, self.lookups = stack, layer, lookups

    @cached_property
    def u(self) -> Tensor:
        """The module's output as it is now: (S x out)."""
        with torch.no_grad():
            return torch.cat([self._run(part, None)[0] for part in self.lookups])

    def __call__(self, u: Tensor) -> Tensor:
        """What leaves the layer where its module gives u (S x out): (S x d)."""
        parts = u.split([len(part.row) for part in self.lookups])
        return torch.cat([self._run(part, own)[1] for part, own in zip(self.lookups, parts, strict=True)])

    def adds_as_is(self) -> bool:
        """Whether J = I: J^T v is v, bit for bit, for a random v."""
        v, back = self._probe()
        return torch.equal(back.cpu(), v.cpu())

    def gains(self) -> Tensor:
        """Root mean square of J's singular values at each u, estimated by a random v: ||J^T v|| / ||v||, (S x 1)."""
        v, back = self._probe()
        found = _norm(back) / _norm(v).to(back.device)
        return torch.where(found > 0, found, torch.ones_like(found))

    def _probe(self) -> tuple[Tensor, Tensor]:
        """A random v (S x d) and J^T v (S x out) at u."""
        with torch.enable_grad():
            u = self.u.detach().requires_grad_(True)
            y = self(u)
            v = torch.randn(y.shape, generator=torch.Generator().manual_seed(self.layer))
            v = v.to(self._dtype).to(y)  # what passes a layer in half precision is a number of half precision
            return v, torch.autograd.grad(y, u, v)[0]

    @property
    def eps(self) -> float:
        """Relative precision of what leaves the layer."""
        return torch.finfo(self._dtype).eps

    @property
    def _dtype(self) -> torch.dtype:
        return self.lookups[0].hidden.dtype

    def _run(self, part: Lookups, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer on a batch, its module's output replaced by u (s x out) at the lookups, if given.

        Returns:
            The module's own output (s x out) and the layer's (s x d) there.
        """
        own: list[Tensor] = []

        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            whole = output.reshape(*part.hidden.shape[:2], -1)  # rows x columns x out
            at = (part.row.to(output.device), part.column.to(output.device))
            own.append(whole[at])
            return None if u is None else whole.index_put(at, u.to(whole)).reshape(output.shape)

        handle = self.stack.rewrite[self.layer].register_forward_hook(replace)
        try:
            hidden = self.stack.run(part.recorded, part.hidden, self.layer, self.layer)
        finally:
            handle.remove()
        at_lookups = hidden[part.row.to(hidden.device), part.column.to(hidden.device)]
        return _wide(own[0]), _wide(at_lookups)


class JointChange:
    """What some layers change in the stream together: F(e) = sum_l f_l(u_l + e_l / c_l) - f_l(u_l), (S x d).

    The changes e (S x L x out) are counted in units of the stream, c_l being the mean gain of layer l's J at each
    position, so that the norm of e weighs the layers alike. Each layer is taken at the hidden states that enter it now.

    Args:
        parts: f_l of each of the L layers, at the same S positions.

    Attributes:
        u: c_l u_l, the modules' outputs in the same units (S x L x out).
        gains: c_l (S x 1) of each layer.
        eps: relative precision of what leaves the layers.
        rounding: the norm that rounding alone leaves of a change (S x 1).
    """

    def __init__(self, parts: Sequence[RemainingPart]) -> None:
        self.parts = parts
        self.gains = [part.gains() for part in parts]
        device = parts[0].u.device
        self.u = torch.stack(
            [(c * part.u).to(device) for c, part in zip(self.gains, parts, strict=True)], dim=1
        )
        with torch.no_grad():
            self._start = [part(part.u) for part in parts]  # S x d each
        self.eps = parts[-1].eps
        self.rounding = self.eps / 4 * _norm(self._start[-1])  # S x 1

    def __call__(self, e: Tensor) -> Tensor:
        changes = [
            part(part.u + own.to(part.u.device) / c) - start
            for part, own, c, start in zip(self.parts, e.unbind(1), self.gains, self._start, strict=True)
        ]
        return sum((change.to(changes[-1].device) for change in changes[:-1]), changes[-1])

    def linearised(self, e: Tensor) -> tuple[Product, Product]:
        """v -> J v (S x d) and w -> J^T w (S x L x out) at e.

        Both by reverse mode, which every module that is trained has: J v is the derivative of J^T w by w.
        """
        with torch.enable_grad():
            e = e.detach().requires_grad_(True)
            y = self(e)
            w = torch.zeros_like(y).requires_grad_(True)
            (transposed,) = torch.autograd.grad(y, e, w, create_graph=True)  # J^T w, linear in w

        def jvp(v: Tensor) -> Tensor:
            return torch.autograd.grad(transposed, w, v, retain_graph=True)[0]

        def vjp(v: Tensor) -> Tensor:
            return torch.autograd.grad(y, e, v, retain_graph=True)[0]

        return jvp, vjp


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def adds_as_is(stack: LayerStack, ids: Sequence[int]) -> bool:
    """Whether all edited layers add their module's output to the residual stream as it is.

    Each layer is asked once, at the last of these token ids.
    """
    unknown = [layer for layer in stack.hparams.layers if layer not in stack.plain_layers]
    if unknown:
        tokens = torch.tensor([list(ids)], device=stack.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        with torch.no_grad(), inference(stack.model):
            recorded = stack.record(inputs, unknown[0], unknown[-1])
            hidden, at = recorded.hidden, unknown[0]
            last = torch.tensor([tokens.shape[1] - 1])
            for layer in unknown:
                hidden = stack.run(recorded, hidden, at, layer - 1)
                at = layer
                lookup = Lookups(recorded, hidden, torch.zeros_like(last), last)
                stack.plain_layers[layer] = RemainingPart(stack, layer, [lookup]).adds_as_is()
    return all(stack.plain_layers[layer] for layer in stack.hparams.layers)
