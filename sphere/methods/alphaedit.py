"""AlphaEdit (Fang et al., ICLR 2025): updates in the null space of preserved knowledge, aware of earlier edits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sphere.errors import SphereError
from sphere.forward.device_memory import has_room
from sphere.hparams import HParams
from sphere.methods.base import TARGET_NUMBERS, Update
from sphere.methods.edited_model import EditedModel
from sphere.methods.layerwise import SequentialMethod, Solved
from sphere.methods.null_space import Projector, decomposition_bytes, null_space_projector
from sphere.methods.sequential_solve import Apply
from sphere.methods.services import Services
from sphere.requests import EditRequest
from sphere.values.compute_ks import ActivationsPass

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AlphaEditHParams(HParams):
    """AlphaEdit's keys.

    Attributes:
        nullspace_threshold: eigenvalues of E[k k^T] below it count as null.
        L2: ridge of the solve.
    """

    nullspace_threshold: float
    L2: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.L2 > 0:
            raise SphereError(f"L2 must be positive, got {self.L2}: without it the solve is singular.")


class AlphaEdit(SequentialMethod):
    """Delta = R K^T P (K K^T P + C P + L2 I)^-1 (eq. 14), layer after layer on the weights edited so far.

    C is the sum of K K^T over earlier batches. The keys of a layer depend only on the layers below it, which have
    their final weights of this batch when the layer is solved: the keys of the solve are those that "recomputed after
    the batch was written" would give, so they are kept as they are.
    """

    name = "AlphaEdit"
    reference = "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv 2410.02355"
    hparams_class = AlphaEditHParams
    default_alpha = 0.5
    tuned: ClassVar[tuple[str, ...]] = (*TARGET_NUMBERS, "nullspace_threshold", "L2")

    def __init__(self, edited: EditedModel, services: Services, hparams: AlphaEditHParams) -> None:
        super().__init__(edited, services, hparams)
        self.projectors: dict[int, Projector] = {}

    def preconditioner(self, layer: int) -> tuple[Apply, float]:
        moment = self.services.second_moment(layer)
        # Decomposed where the layer is (a GPU takes seconds where a CPU takes minutes), kept where its moment is.
        device = self.edited.layer_device(layer)
        if not has_room(device, decomposition_bytes(len(moment))):
            device = moment.device
        projector = null_space_projector(moment.to(device), self.hparams.nullspace_threshold)
        projector = projector.to(moment.device)
        log.info("Layer %d: null space of dimension %d.", layer, projector.dim)
        self.projectors[layer] = projector
        return projector.apply, self.hparams.L2

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        targets = self.target_values(requests)  # Z: out x n
        bare = self.services.bare_pass(requests)
        yield from self.deliver(
            self.solved(self.services.activations(requests), bare, targets), bare, targets
        )

    def solved(
        self, activations: ActivationsPass, bare: ActivationsPass, targets: Tensor
    ) -> Iterator[Solved]:
        """Delta (out x in) of one layer after the other towards Z (out x n), each to be written before the next."""
        for layer in self.hparams.layers:
            keys = activations.compute_ks(layer)  # K: in x n
            yield self.solve_layer(layer, keys, self.residual(layer, activations, targets), bare)
            self.remember(layer, keys)
