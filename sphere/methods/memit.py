"""MEMIT (Meng et al., ICLR 2023), and MEMIT_seq, which also sees the keys of earlier batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from sphere.hparams import HParams
from sphere.methods.base import Method, Update, Workspace, spread_residual
from sphere.requests import EditRequest
from sphere.solvers import SequentialSolve, inverse_moment, keep_keys, load_keys, save_keys


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

    def prepare(self) -> None:
        for layer in self.hparams.layers:
            if layer not in self.solves:
                moment = self.workspace.moments.get(layer)
                spread = inverse_moment(moment, self.hparams.mom2_update_weight, f"layer {layer}")
                self.solves[layer] = SequentialSolve(spread, 1.0, f"layer {layer}")

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        yield from self.solve_layers(requests)

    def solve_layers(self, requests: Sequence[EditRequest]) -> list[Update]:
        """Delta (out x in) of every layer, found on a temporarily edited model."""
        targets = self.workspace.target_values(requests).z.T  # out x n
        layers, found = self.hparams.layers, []
        with self.workspace.weights.temporarily():
            walk = self.workspace.walk(requests)
            for index, layer in enumerate(layers):
                keys = walk.keys(layer)  # K: in x n
                outputs = walk.outputs(max(layers))  # out x n
                residual = spread_residual(targets.to(keys.device), outputs, len(layers) - index)
                x = self.solves[layer].solve(keys)  # in x n
                update = residual.to(x) @ x.T
                self.workspace.weights.add_(self.workspace.stack.weight_name(layer), update)
                found.append((self.workspace.stack.weight_name(layer), update))
        return found


class MEMITSeq(MEMIT):
    """MEMIT with the sum of the earlier batches' K K^T added inside the inverse (AlphaEdit's baseline of that name).

    The earlier keys are those of the weights as they stand after the batch was written.
    """

    name = "MEMIT_seq"
    reference = (
        "MEMIT with earlier keys preserved, as in AlphaEdit, arXiv 2410.02355, and SPHERE, arXiv 2510.01172"
    )

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        yield from super().updates(requests)
        walk = self.workspace.walk(requests)
        for layer in self.hparams.layers:
            self.solves[layer].append(walk.keys(layer))

    def state(self) -> dict[str, Tensor]:
        return save_keys(self.solves)

    def keep_state(self, names: Collection[str]) -> None:
        keep_keys(self.solves, names)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_keys(self.solves, state, self.workspace.stack.devices)
