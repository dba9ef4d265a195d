"""Methods that write residuals onto keys, layer after layer, by the sequential solve (AlphaEdit, MEMIT and its kin).

Holds what they share: one solve per layer, where it is done, and what a resume point keeps of earlier keys. Knows
nothing of what makes them differ: their preconditioners, and when a layer's update is written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from sphere.methods.base import TARGET_NUMBERS, Method
from sphere.methods.edited_model import EditedModel
from sphere.methods.sequential_solve import Apply, SequentialSolve, keep_solves, load_solves, save_solves
from sphere.methods.services import Services


class LayerwiseMethod(Method):
    """Delta_l = R_l X_l^T with X_l from the sequential solve of layer l."""

    tuned: ClassVar[tuple[str, ...]] = TARGET_NUMBERS

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

    def prepared_from(self) -> dict[str, str]:
        return {"second_moments": self.services.second_moments.digest()}

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """X (in x n, float64, on the keys' device) for a layer's keys K (in x n), given the earlier ones."""
        return self.solves[layer].solve(keys.to(self.services.solve_device(layer))).to(keys.device)

    def remember(self, layer: int, keys: Tensor) -> None:
        """Count a batch's keys K (in x n) among a layer's earlier ones."""
        self.solves[layer].append(keys.to(self.services.solve_device(layer)))

    def state(self) -> dict[str, Tensor]:
        return save_solves(self.solves)

    def keep_state(self, names: Collection[str]) -> None:
        keep_solves(self.solves, names)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        devices = {layer: self.services.solve_device(layer) for layer in self.solves}
        load_solves(self.solves, state, devices)
