"""Methods that write residuals onto keys, layer after layer, most of them by the sequential solve.

Holds what they share: target values and their anchor, what the updates did for them; and of those with the sequential
solve (AlphaEdit, MEMIT and its kin) one solve per layer, where it is done, and what a resume point keeps of earlier
keys. Knows nothing of what makes them differ: their preconditioners, and when a layer's update is written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sphere.factors import Factors
from sphere.methods.base import TARGET_NUMBERS, Method, Update, spread_residual
from sphere.methods.delivery import Delivery, delivery
from sphere.methods.edited_model import EditedModel
from sphere.methods.sequential_solve import Apply, SequentialSolve, keep_solves, load_solves, save_solves
from sphere.methods.services import Services
from sphere.requests import EditRequest
from sphere.values.compute_ks import ActivationsPass
from sphere.values.module_residual import module_residual
from sphere.values.z_rescale import added, anchor_of, rescaled

ANCHOR = "z_anchor"  # its name in a saved state


class Solved(NamedTuple):
    """A layer's update Delta (out x in), the change R (d x n) of the outputs that it was asked for, Delta's factors."""

    layer: int
    delta: Tensor
    asked: Tensor
    factors: Factors | None = None


class LayerwiseMethod(Method):
    """Delta_l of one edited layer after the other, towards target values Z."""

    tuned: ClassVar[tuple[str, ...]] = TARGET_NUMBERS

    def __init__(self, edited: EditedModel, services: Services, hparams: Any) -> None:
        super().__init__(edited, services, hparams)
        self._delivered: dict[str, Delivery] = {}
        self.anchor: Tensor | None = None  # norm that z is rescaled to, once there was a batch
        self._factors: Factors | None = None  # of the update that was yielded last

    def prepared_from(self) -> dict[str, str]:
        return {"second_moments": self.services.second_moments.digest()}

    def target_values(self, requests: Sequence[EditRequest]) -> Tensor:
        """Z (out x n) of a batch; rescaled, where the hyperparameters say so, to the first batch's mean norm of v*."""
        values = self.services.compute_z(requests)
        if not self.hparams.z_rescale:
            return values.z.T
        v_0 = added(self.services.bare_pass(requests), max(self.hparams.layers))
        if self.anchor is None:
            self.anchor = anchor_of(values, v_0)
        return rescaled(values, v_0, self.anchor).T

    def residual(self, layer: int, activations: ActivationsPass, targets: Tensor) -> Tensor:
        """R (out x n): the part of what is missing to Z (out x n) that this layer, of those still left, shall write."""
        layers = self.hparams.layers
        return spread_residual(targets, activations.outputs(max(layers)), len(layers) - layers.index(layer))

    def deliver(self, solved: Iterable[Solved], bare: ActivationsPass, targets: Tensor) -> Iterator[Update]:
        """Yield the updates of increasing layers; once each is written, note what it did for Z (`delivered`).

        Args:
            bare: the pass of the bare prompts, before any of these updates.
            targets: Z (out x n).
        """
        top = max(self.hparams.layers)
        eps = torch.finfo(bare.stack.model.dtype).eps
        self._delivered = {}
        first = now = bare.outputs(top)  # out x n
        for layer, delta, asked, factors in solved:
            bare.advance(layer)
            name, self._factors = self.edited.weight_name(layer), factors
            yield name, delta
            before, now = now, bare.outputs(top)
            self._delivered[name] = delivery(targets, first, before, now, asked, eps)

    def delivered(self) -> Mapping[str, Delivery]:
        return self._delivered

    def factors(self) -> Factors | None:
        return self._factors

    def state(self) -> dict[str, Tensor]:
        return {} if self.anchor is None else {ANCHOR: self.anchor.cpu()}

    def keep_state(self, names: Collection[str]) -> None:
        if ANCHOR not in names:
            self.anchor = None

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.anchor = state.get(ANCHOR)


class SequentialMethod(LayerwiseMethod):
    """Delta_l = R_l X_l^T with X_l from the sequential solve of layer l."""

    def __init__(self, edited: EditedModel, services: Services, hparams: Any) -> None:
        super().__init__(edited, services, hparams)
        self.solves: dict[int, SequentialSolve] = {}

    @abstractmethod
    def preconditioner(self, layer: int) -> tuple[Apply, float]:
        """K -> S K, and the damping c, of a layer's solve; asked for once, on the unedited model."""

    def prepare(self) -> None:
        for layer in self.hparams.layers:
            if layer not in self.solves:
                apply_s, damping = self.preconditioner(layer)
                self.solves[layer] = SequentialSolve(apply_s, damping, f"layer {layer}")

    def solve_layer(self, layer: int, keys: Tensor, residual: Tensor, bare: ActivationsPass) -> Solved:
        """Delta = R X^T (out x in) of a layer, from its keys K (in x n) and the residual R (out x n).

        Args:
            bare: the pass of the bare prompts, by which R becomes a change of what the edited module puts out.
        """
        x = self.solve(layer, keys)  # in x n
        r = module_residual(bare, layer, residual).to(x)  # out x n
        return Solved(layer, r @ x.T, residual, Factors(r, x))

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """X (in x n, float64, on the keys' device) for a layer's keys K (in x n), given the earlier ones."""
        return self.solves[layer].solve(keys.to(self.services.solve_device(layer))).to(keys.device)

    def remember(self, layer: int, keys: Tensor) -> None:
        """Count a batch's keys K (in x n) among a layer's earlier ones."""
        self.solves[layer].append(keys.to(self.services.solve_device(layer)))

    def state(self) -> dict[str, Tensor]:
        return save_solves(self.solves) | super().state()

    def keep_state(self, names: Collection[str]) -> None:
        super().keep_state(names)
        keep_solves(self.solves, names)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        devices = {layer: self.services.solve_device(layer) for layer in self.solves}
        load_solves(self.solves, state, devices)
