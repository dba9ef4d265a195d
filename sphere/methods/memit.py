"""MEMIT (Meng et al., ICLR 2023), and MEMIT_seq, which also sees the keys of earlier batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sphere.hparams import HParams
from sphere.methods.base import Method, Update, Workspace, spread_residual
from sphere.methods.sequential_solve import SequentialSolve, inverse_moment, keep_keys, load_keys, save_keys
from sphere.requests import EditRequest
from sphere.runs.memory import FLOAT64, Item, Sizes, key_cache, moment_factors, second_moments
from sphere.values.compute_ks import ActivationsPass


class MEMIT(Method):
    """Delta = R K^T (lambda M + K K^T)^-1 (eq. 14), with M = E[k k^T] and lambda = `mom2_update_weight`.

    The layers are solved one after the other on a temporarily edited model, which is then restored; the updates of
    all layers are then yielded to pass the rules.
    """

    name = "MEMIT"
    reference = "Mass-Editing Memory in a Transformer, arXiv 2210.07229"
    hparams_class = HParams

    def __init__(self, workspace: Workspace, hparams: HParams) -> None:
        super().__init__(workspace, hparams)
        self.solves: dict[int, SequentialSolve] = {}

    @classmethod
    def memory(cls, hparams: Any, sizes: Sizes) -> list[Item]:
        updates = Item(
            "all layers' updates, and the weights before",
            "(8 + 4) E",
            (FLOAT64 + sizes.exact_bytes) * sizes.entries,
            sizes.offload_device,
            since="solve",
            until="writing",
        )
        return [*second_moments(sizes), *moment_factors(sizes), updates]

    @classmethod
    def solve_operations(cls, hparams: HParams, sizes: Sizes) -> float:
        n = sizes.num_edits
        return sum(in_features * n * (2 * in_features + 4 * n + 2 * out) for out, in_features in sizes.edited)

    def prepare(self) -> None:
        for layer in self.hparams.layers:
            if layer not in self.solves:
                moment = self.workspace.moments.get(layer)
                spread = inverse_moment(moment, self.hparams.mom2_update_weight, f"layer {layer}")
                self.solves[layer] = SequentialSolve(spread, 1.0, f"layer {layer}")

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        targets = self.workspace.target_values(requests).z.T  # out x n
        activations = self.workspace.activations(requests)
        yield from self.solve_layers(activations, targets)
        self.remember(activations)

    def remember(self, activations: ActivationsPass) -> None:
        """What later batches shall know of this one, which has been written: nothing."""

    def solve_layers(self, activations: ActivationsPass, targets: Tensor) -> list[Update]:
        """Delta (out x in) of every layer towards Z (out x n), found on a temporarily edited model."""
        layers, found = self.hparams.layers, []
        with self.workspace.weights.temporarily("cpu" if self.workspace.conserve_memory else None):
            for index, layer in enumerate(layers):
                keys = activations.compute_ks(layer)  # K: in x n
                outputs = activations.outputs(max(layers))  # out x n
                residual = spread_residual(targets.to(keys.device), outputs, len(layers) - index)
                there = keys.to(self.workspace.solve_devices[layer])
                x = self.solves[layer].solve(there).to(keys.device)  # in x n
                update = residual.to(x) @ x.T
                self.workspace.weights.add_(self.workspace.stack.weight_name(layer), update)
                kept = update.cpu() if self.workspace.conserve_memory else update
                found.append((self.workspace.stack.weight_name(layer), kept))
        return found


class MEMITSeq(MEMIT):
    """MEMIT with the sum of the earlier batches' K K^T added inside the inverse (AlphaEdit's baseline of that name).

    The earlier keys are those of the weights as they stand after the batch was written.
    """

    name = "MEMIT_seq"
    reference = (
        "MEMIT with earlier keys preserved, as in AlphaEdit, arXiv 2410.02355, and SPHERE, arXiv 2510.01172"
    )

    @classmethod
    def memory(cls, hparams: Any, sizes: Sizes) -> list[Item]:
        return [*super().memory(hparams, sizes), *key_cache(sizes)]

    @classmethod
    def solve_operations(cls, hparams: HParams, sizes: Sizes) -> float:
        earlier = sizes.n_edits / 2
        cached = sum(4 * i * min(earlier, i) * sizes.num_edits for _, i in sizes.edited)
        return super().solve_operations(hparams, sizes) + cached

    def remember(self, activations: ActivationsPass) -> None:
        activations.restart()
        for layer in self.hparams.layers:
            self.solves[layer].append(activations.compute_ks(layer).to(self.workspace.solve_devices[layer]))

    def state(self) -> dict[str, Tensor]:
        return save_keys(self.solves)

    def keep_state(self, names: Collection[str]) -> None:
        keep_keys(self.solves, names)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_keys(self.solves, state, self.workspace.solve_devices)
