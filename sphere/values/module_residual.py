"""The residual at the edited module's output, where it is not added to the residual stream as it is.

A solver writes what the *module* of a layer shall add, but z, and so what is missing, Z - Z_now, is an output of a
*layer*. With f_l layer l's remaining part, from its module's output u to its own, f_l(u) = r + u in Llama or GPT-2, and
each of the layers left takes on R = (Z - Z_now) / layers left (MEMIT, eq. 20): of all changes of their modules that add
up to what is missing, the least. The same elsewhere: the modules of the layers left shall change by

    e  =  the least change with which  || Z - Z_now - F(e) ||  is least,    F(e) = sum_l f_l(u_l + e_l) - f_l(u_l),

of which layer l's own part e_l is written; then the next layer's is found anew. e is found by a few damped Gauss-Newton
steps (Levenberg 1944, Marquardt 1963)

    (J^T J + damping I) step = J^T (Z - Z_now - F(e)),    J = dF/de,

each solved by conjugate gradients, which first take the directions that F lets through most. Where f_l(u) = r + m u,
the first step is the last. What passes a norm lies on an ellipsoid of fixed size, whatever the length of u: what is
missing may then not be reached, and of all u_l + e_l on one ray the nearest to u_l is taken.

Knows the remaining parts of layers. Knows nothing of solvers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphere.forward.modules import inference
from sphere.forward.remaining import JointChange, Product, adds_as_is
from sphere.values.compute_ks import ActivationsPass

STEPS = 10  # damped Gauss-Newton steps at most
INNER_STEPS = 12  # of conjugate gradients, in each
LEAST_DAMPING = 1e-6  # relative to what J^T J does to what is missing
LARGEST_DAMPING = 10.0
DAMPING_FACTOR = 10.0
GAIN = 1e-2  # fraction of the target by which a step must come nearer: the last percents cost the largest changes
REACHED = 1e-3  # fraction of the target that may be missing


def module_residual(activations: ActivationsPass, layer: int, residual: Tensor) -> Tensor:
    """What the edited module of a layer shall add, where the layer's output shall change by R.

    Args:
        activations: a pass of the batch, brought up to this layer.
        residual: R (d x n), of what is missing the fraction of one of the edited layers left.

    Returns:
        (out x n); R itself where the layers add their modules' outputs to the residual stream as they are.
    """
    if adds_as_is(activations.stack, activations.bare_ids):
        return residual
    layers = [later for later in activations.stack.hparams.layers if later >= layer]
    with inference(activations.stack.model):
        joint, index = JointChange(activations.remaining_parts(layers)), activations.bare_index
        found = residual.new_zeros(joint.u.shape[2], residual.shape[1])  # out x n
        for chosen in _without_repeats(index.tolist()):
            target = residual.new_zeros(len(joint.u), len(residual))  # S x d
            target[index[chosen]] = len(layers) * residual.T[chosen]
            own = least_change(joint, target)[:, 0] / joint.gains[0].to(joint.u.device)  # S x out
            found[:, chosen] = own[index[chosen]].T.to(found)
    return found


def least_change(joint: JointChange, target: Tensor) -> Tensor:
    """The least e (S x L x out) with which F(e) comes as near to the target (S x d) as it can; see above.

    Every row has its own damping: raised where a step leads away from the target, lowered where it is taken.
    """
    u = joint.u
    target = target.to(joint.rounding)
    e, missing, size = torch.zeros_like(u), target, _norm(target)  # S x L x out, S x d, S x 1
    floor = torch.maximum(REACHED * size, joint.rounding)
    least = max(LEAST_DAMPING, joint.eps)  # J is known to this precision
    damping = torch.full_like(size, least)
    open_ = size > floor
    for _ in range(STEPS):
        if not open_.any():
            break
        jvp, vjp = joint.linearised(e)
        tried, left = _nearest_on_rays(
            joint, e + _damped_step(jvp, vjp, missing, damping, 10 * joint.eps), target
        )
        gain = _norm(missing) - _norm(left)
        taken = open_ & (gain >= GAIN * size)
        e = torch.where(taken[..., None].to(u.device), tried, e)
        missing = torch.where(taken, left, missing)
        damping = torch.where(taken, damping / DAMPING_FACTOR, damping * DAMPING_FACTOR)
        damping = damping.clamp(min=least)
        open_ = open_ & (taken | ~(gain >= 0)) & (_norm(missing) > floor) & (damping <= LARGEST_DAMPING)
    return e


def _damped_step(jvp: Product, vjp: Product, missing: Tensor, damping: Tensor, tolerance: float) -> Tensor:
    """Conjugate gradients on (J^T J + c I) s = J^T missing, row by row: s (S x L x out).

    Args:
        damping: (S x 1), c in units of ||J^T missing||^2 / ||missing||^2.
        tolerance: a row stops where the residual of this system is that much smaller than at first: what is left is
            rounding, which the directions that J does not see would return divided by c.
    """
    rest = vjp(missing)  # S x L x out
    square = first = _square(rest)  # S x 1 x 1
    c = damping[..., None].to(rest) * _ratio(square, _square(missing)[..., None].to(rest))
    step, direction = torch.zeros_like(rest), rest
    for _ in range(INNER_STEPS):
        image = vjp(jvp(direction)) + c * direction
        length = _ratio(square, (direction * image).sum(dim=(1, 2), keepdim=True))
        length = length * (square > tolerance**2 * first)
        step, rest = step + length * direction, rest - length * image
        before, square = square, _square(rest)
        direction = rest + _ratio(square, before) * direction
    return step


@torch.no_grad()
def _nearest_on_rays(joint: JointChange, e: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The points of the rays through u_l + e_l that are nearest to u_l, where F does as much for the target there.

    Returns:
        e (S x L x out) and what F misses of the target there (S x d).
    """
    u, point = joint.u, joint.u + e
    along = _ratio((u * point).sum(dim=2, keepdim=True), point.square().sum(dim=2, keepdim=True))  # S x L x 1
    nearest = along * point - u
    left, left_nearest = target - joint(e), target - joint(nearest)
    as_good = _norm(left_nearest) <= _norm(left) + GAIN / 10 * _norm(target)
    return torch.where(as_good[..., None].to(u.device), nearest, e), torch.where(as_good, left_nearest, left)


def contribution(activations: ActivationsPass, layer: int, output: Tensor) -> Tensor:
    """What the edited module adds to the layer's output: its own output where added as it is, else f(u) - f(0).

    Args:
        output: u of a batch of one request (out,).
    """
    if adds_as_is(activations.stack, activations.bare_ids):
        return output
    (part,) = activations.remaining_parts([layer])
    with torch.no_grad():
        return (part(part.u) - part(torch.zeros_like(part.u)))[0]


class Reach:
    """The changes delta = F(e) of the z layer's output that the edited layers can give together.

    Args:
        activations: a pass of the batch, not yet brought up to any layer.

    To be used within `sphere.forward.modules.inference`.

    Attributes:
        e: the variable (n x L x out), 0 at first.
    """

    def __init__(self, activations: ActivationsPass) -> None:
        self.joint = JointChange(activations.remaining_parts(activations.stack.hparams.layers))
        self.index = activations.bare_index.to(self.joint.u.device)  # (n,)
        self.chosen = [torch.tensor(group) for group in _without_repeats(self.index.tolist())]
        _, *shape = self.joint.u.shape
        self.e = self.joint.u.new_zeros(len(self.index), *shape).requires_grad_(True)
        self._delta = self._changed()

    def group(self, lr: float) -> dict[str, Any]:
        """Adam's group of variables: its steps move delta as far as if they were delta's own, with this rate."""
        return {"params": [self.e], "lr": lr / self.e.shape[1]}

    def pull_back(self, gradient: Tensor) -> None:
        """The variable's gradient, from delta's (n x d)."""
        self._delta.backward(gradient.to(self._delta))

    def delta(self) -> Tensor:
        """delta (n x d) at the variable as it stands."""
        self._delta = self._changed()
        return self._delta.detach()

    def _changed(self) -> Tensor:
        with torch.enable_grad():
            parts = []
            for chosen in self.chosen:
                at = self.index[chosen.to(self.index.device)]
                e = torch.zeros_like(self.joint.u).index_put((at,), self.e[chosen.to(at.device)])
                reached = self.joint(e)  # S x d, where the last layer is
                parts.append(reached[at.to(reached.device)])
            order = torch.cat(self.chosen).argsort()
            return torch.cat(parts)[order.to(parts[0].device)]


def _without_repeats(index: Sequence[int]) -> list[list[int]]:
    """Numbers of requests in as few groups as hold no position twice."""
    groups: list[dict[int, int]] = []
    for number, position in enumerate(index):
        group = next((g for g in groups if position not in g), None)
        if group is None:
            groups.append(group := {})
        group[position] = number
    return [list(group.values()) for group in groups]


def _square(x: Tensor) -> Tensor:
    """Sum of squares of each row, the other dimensions kept."""
    return x.square().sum(dim=tuple(range(1, x.ndim)), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / b.clamp(min=torch.finfo(b.dtype).tiny), torch.zeros_like(a))
