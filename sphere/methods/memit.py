"""MEMIT (Meng et al., ICLR 2023), and MEMIT_seq, which also sees the keys of earlier batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from sphere.hparams import HParams
from sphere.methods.base import TARGET_NUMBERS, Update
from sphere.methods.layerwise import SequentialMethod, Solved
from sphere.methods.sequential_solve import Apply, inverse_moment
from sphere.requests import EditRequest
from sphere.values.compute_ks import ActivationsPass


class MEMIT(SequentialMethod):
    """Delta = R K^T (lambda M + K K^T)^-1 (eq. 14), with M = E[k k^T] and lambda = `mom2_update_weight`.

    The layers are solved one after the other on a temporarily edited model, which is then restored; the updates of
    all layers are then yielded to pass the rules. Nothing is remembered from batch to batch.
    """

    name = "MEMIT"
    reference = "Mass-Editing Memory in a Transformer, arXiv 2210.07229"
    solves_first = True
    hparams_class: ClassVar[type[HParams]] = HParams
    tuned: ClassVar[tuple[str, ...]] = (*TARGET_NUMBERS, "mom2_update_weight")

    def preconditioner(self, layer: int) -> tuple[Apply, float]:
        moment, weight = self.services.second_moment(layer), self.hparams.mom2_update_weight
        return inverse_moment(moment, weight, f"layer {layer}"), 1.0

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        targets = self.target_values(requests)  # Z: out x n
        bare = self.services.bare_pass(requests)
        found = self.solve_layers(self.services.activations(requests), bare, targets)
        yield from self.deliver(found, bare.restart(), targets)

    def solve_layers(
        self, activations: ActivationsPass, bare: ActivationsPass, targets: Tensor
    ) -> list[Solved]:
        """Delta (out x in) of every layer towards Z (out x n), found on a temporarily edited model."""
        weights, offload_device, found = self.edited.weights, self.services.offload_device, list[Solved]()
        with weights.temporarily(offload_device):
            for layer in self.hparams.layers:
                keys = activations.compute_ks(layer)  # K: in x n
                solved = self.solve_layer(layer, keys, self.residual(layer, activations, targets), bare)
                weights.add_(self.edited.weight_name(layer), solved.delta)
                found.append(solved._replace(delta=solved.delta.to(offload_device or solved.delta.device)))
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
        self.prepare()
        targets = self.target_values(requests)  # Z: out x n
        activations = self.services.activations(requests)
        bare = self.services.bare_pass(requests)
        found = self.solve_layers(activations, bare, targets)
        yield from self.deliver(found, bare.restart(), targets)
        activations.restart()
        for layer in self.hparams.layers:
            self.remember(layer, activations.compute_ks(layer))
