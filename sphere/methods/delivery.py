"""What a batch's updates did to the outputs that its target values z ask for.

An update may fall short of z: SPHERE takes a part of it away, a large second moment or earlier keys hold it back, keys
of a batch are alike, a norm lets only so much through. Silence about that would pass for success.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sphere.requests import EditRequest

log = logging.getLogger(__name__)

Delivery = dict[str, float | None]
DISTANCE, DELIVERED = "z_distance", "residual_delivered"
# Further from z than this, relative to the way there, a batch is warned of: at its end, and after a layer before.
LARGEST_DISTANCE, LARGEST_ON_THE_WAY = 0.5, 1.1


def delivery(
    targets: Tensor, first: Tensor, before: Tensor, after: Tensor, asked: Tensor, eps: float
) -> Delivery:
    """Metrics of one update.

    Args:
        targets: Z (out x n).
        first: the z layer's outputs at the lookup tokens of the bare prompts, before the batch (out x n).
        before, after: the same before and after the update was written (out x n).
        asked: R (out x n), the change of these outputs that the update was to make.
        eps: relative precision of the model's dtype.

    Returns:
        z_distance: sum ||Z - after|| / sum ||Z - first||, over the requests: what is still missing of the way to z.
        residual_delivered: sum <after - before, R> / sum ||R||^2: the fraction of what was asked that came about.
        Both None where z asks for no more than the dtype's rounding.
    """
    targets, first, before, asked = (t.to(after) for t in (targets, first, before, asked))
    way, size = _norms(targets - first), _norms(targets)
    if not way > eps * size:
        return {DISTANCE: None, DELIVERED: None}
    delivered = ((after - before) * asked).sum() / asked.square().sum()
    return {DISTANCE: _norms(targets - after) / way, DELIVERED: float(delivered)}


def check_delivery(layers: Mapping[str, Mapping[str, Any]], requests: Sequence[EditRequest]) -> list[str]:
    """Report (and log) that a batch's updates leave the outputs too far from z, or took them away from it on the way.

    Args:
        layers: metrics of each weight, in the order of writing.

    Returns:
        The sentences.
    """
    distances = {
        name: metrics[DISTANCE] for name, metrics in layers.items() if metrics.get(DISTANCE) is not None
    }
    if not distances:
        return []
    last, cases = [*distances.values()][-1], f"cases {requests[0].case_id} to {requests[-1].case_id}"
    astray = {name: distance for name, distance in distances.items() if distance > LARGEST_ON_THE_WAY}
    if not last <= LARGEST_DISTANCE:  # which holds for nan, too
        told = "hardly moved towards" if last <= 1 else "went further away from"
        warning = (
            f"The outputs of the batch of {cases} {told} their target values: {last:.2f} of the distance to z is left "
            "after the update, so the targets will hardly be likelier; see residual_delivered of each layer in "
            "batches.jsonl, and try a smaller L2 or mom2_update_weight, or a weaker rule."
        )
    elif astray:
        warning = (
            f"The outputs of the batch of {cases} were further from their target values after the update of "
            f"{', '.join(astray)} than before the batch (up to {max(astray.values()):.2f} of the distance to z): "
            "what such layers write may disturb more than it helps; try without the lowest of `layers`."
        )
    else:
        return []
    log.warning("%s", warning)
    return [warning]


def _norms(x: Tensor) -> float:
    """Sum over requests of the norm of each column."""
    return float(torch.linalg.vector_norm(x, dim=0).sum())
