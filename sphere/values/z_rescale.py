"""Target values rescaled to a norm of the unedited model: norm-anchor scaling (NAS, arXiv 2602.02543).

With v_0 what the edited module of the z layer adds to the layer's output at the lookup token, and delta = z - h_0 the
step that was found, v* = v_0 + delta is brought to the norm that v* has on the unedited model, on average over a
sample of facts. Weights that grow make v_0 grow, and v* with it: this breaks the loop. Knows nothing of methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphere.forward.modules import inference
from sphere.forward.remaining import adds_as_is
from sphere.values.compute_ks import ActivationsPass
from sphere.values.compute_z import TargetValues

TOO_LARGE = 2.0  # times the anchor: a v* of this norm is not written


def added(bare: ActivationsPass, layer: int) -> Tensor:
    """v_0 (n x d): what the edited module of a layer adds to the layer's output, for the bare prompts of a batch.

    Where the layer adds the module's output u as it is, that is u, else f(u) - f(0).
    """
    with inference(bare.stack.model), torch.no_grad():
        (part,) = bare.remaining_parts([layer])
        own = (
            part.u if adds_as_is(bare.stack, bare.bare_ids) else part(part.u) - part(torch.zeros_like(part.u))
        )
    return own[bare.bare_index.to(own.device)]


def anchor_of(values: TargetValues, v_0: Tensor) -> Tensor:
    """The mean norm of v* over the facts of a batch, ()."""
    return (v_0.to(values.z) + values.z - values.h0).norm(dim=1).mean()


def rescaled(values: TargetValues, v_0: Tensor, anchor: Tensor) -> Tensor:
    """z (n x d) with v* of the anchor's norm; z = h_0, no edit, where the norm of v* is above twice the anchor."""
    v_0, anchor = v_0.to(values.z), anchor.to(values.z)
    v_star = v_0 + values.z - values.h0  # n x d
    norm = v_star.norm(dim=1, keepdim=True)
    z = values.h0 - v_0 + v_star * (anchor / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    return torch.where(norm > TOO_LARGE * anchor, values.h0, z)
