"""When a batch's updates pass the rules: each before the next is solved, or all once all are solved.

"within" lets a method that solves layer after layer (AlphaEdit) solve each layer on the layers below as they were
written, rules applied. "after" lets it solve all of them on a temporarily edited model, each update written as it is,
and gives the rules the updates of all layers then; so does EasyEdit's SPHERE. For methods that solve all layers first
anyway (`solves_first`: MEMIT and its kin) the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sphere.errors import SphereError
from sphere.factors import Factors
from sphere.methods.base import Method
from sphere.requests import EditRequest

PROJECT = ("within", "after")


def check_project(project: str) -> None:
    """Refuse another word.

    Raises:
        SphereError: it is none of PROJECT.
    """
    if project not in PROJECT:
        raise SphereError(f"project is one of {', '.join(PROJECT)}, got '{project}'.", argument="project")


def updates_of(
    method: Method, requests: Sequence[EditRequest], project: str
) -> Iterator[tuple[str, Tensor, Factors | None]]:
    """(weight name, Delta (out x in), its factors) of a batch, in the order in which they are to be written."""
    if project == "within" or method.solves_first:
        for name, delta in method.updates(requests):
            yield name, delta, method.factors()
        return
    weights, device = method.edited.weights, method.services.offload_device
    found = []
    with weights.temporarily(device):
        for name, delta in method.updates(requests):
            weights.add_(name, delta)
            found.append((name, delta.to(device or delta.device), method.factors()))
    yield from found
