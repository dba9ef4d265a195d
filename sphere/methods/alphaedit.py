"""AlphaEdit (Fang et al., ICLR 2025): updates in the null space of preserved knowledge, aware of earlier edits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sphere.errors import SphereError
from sphere.forward.device_memory import has_room
from sphere.hparams import HParams
from sphere.methods.base import Method, Update, Workspace, spread_residual
from sphere.methods.null_space import Projector, null_space_projector
from sphere.methods.sequential_solve import SequentialSolve, keep_keys, load_keys, save_keys
from sphere.requests import EditRequest
from sphere.runs.memory import FLOAT32, Item, Sizes, key_cache, second_moments

log = logging.getLogger(__name__)

# An eigendecomposition holds the moment, its eigenvectors, LAPACK's work space of two such matrices, and the basis.
DECOMPOSITION = 4.5


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


class AlphaEdit(Method):
    """Delta = R K^T P (K K^T P + C P + L2 I)^-1 (eq. 14), layer after layer on the weights edited so far.

    C is the sum of K K^T over earlier batches. The keys of a layer depend only on the layers below it, which have
    their final weights of this batch when the layer is solved: the keys of the solve are those that "recomputed after
    the batch was written" would give, so they are kept as they are.
    """

    name = "AlphaEdit"
    reference = "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv 2410.02355"
    hparams_class = AlphaEditHParams
    default_alpha = 0.5

    def __init__(self, workspace: Workspace, hparams: AlphaEditHParams) -> None:
        super().__init__(workspace, hparams)
        self.solves: dict[int, SequentialSolve] = {}
        self.projectors: dict[int, Projector] = {}

    @classmethod
    def memory(cls, hparams: AlphaEditHParams, sizes: Sizes) -> list[Item]:
        basis = Item(
            "null-space projectors' thinner factors",
            "sum of 4 in^2 / 2 at most",
            FLOAT32 * sizes.sum_squared_in // 2,
            sizes.offload_device,
            since="preparation",
            until="writing",
        )
        decomposition = Item(
            "one of them in the making",
            f"{DECOMPOSITION} x 4 in^2 at most",
            int(DECOMPOSITION * FLOAT32 * sizes.largest_in**2),
            sizes.offload_device,
            since="preparation",
            until="preparation",
        )
        return [*second_moments(sizes), basis, decomposition, *key_cache(sizes)]

    @classmethod
    def solve_operations(cls, hparams: AlphaEditHParams, sizes: Sizes) -> float:
        n, earlier = sizes.num_edits, sizes.n_edits / 2
        return sum(
            in_features * n * (4 * in_features / 2 + 4 * min(earlier, in_features) + 4 * n + 2 * out)
            for out, in_features in sizes.edited
        )

    def prepare(self) -> None:
        for layer in self.hparams.layers:
            if layer in self.solves:
                continue
            moment = self.workspace.moments.get(layer)
            # Decomposed where the layer is (a GPU takes seconds where a CPU takes minutes), kept where its moment is.
            where = self.workspace.stack.devices[layer]
            if not has_room(where, int(DECOMPOSITION * FLOAT32 * len(moment) ** 2)):
                where = moment.device
            projector = null_space_projector(moment.to(where), self.hparams.nullspace_threshold)
            projector = projector.to(moment.device)
            log.info("Layer %d: null space of dimension %d.", layer, projector.dim)
            self.projectors[layer] = projector
            self.solves[layer] = SequentialSolve(projector.apply, self.hparams.L2, f"layer {layer}")

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        targets = self.workspace.target_values(requests).z.T  # out x n
        activations = self.workspace.activations(requests)
        layers = self.hparams.layers
        for index, layer in enumerate(layers):
            keys = activations.compute_ks(layer)  # K: in x n
            residual = spread_residual(
                targets.to(keys.device), activations.outputs(max(layers)), len(layers) - index
            )
            there = keys.to(self.workspace.solve_devices[layer])
            x = self.solves[layer].solve(there).to(keys.device)  # in x n
            yield self.workspace.stack.weight_name(layer), residual.to(x) @ x.T
            self.solves[layer].append(there)

    def state(self) -> dict[str, Tensor]:
        return save_keys(self.solves)

    def keep_state(self, names: Collection[str]) -> None:
        keep_keys(self.solves, names)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_keys(self.solves, state, self.workspace.solve_devices)
