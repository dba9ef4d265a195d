"""How far edited weights have moved from the unedited ones: energy, principal directions, norm.

Knows matrices by their names. Knows nothing of models, runs or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.hypersphere import PLAIN_BETA, hyperspherical_energy, rotation
from sphere.projection import principal_directions


class WeightChange:
    """How far edited weights have moved from the unedited ones; what is asked of the latter is found once.

    Args:
        original: name -> unedited weight (out x in).
        device: where it is computed.
    """

    def __init__(self, original: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        self.original, self.device = original, device
        self._bases: dict[str, Tensor] = {}
        self._energies: dict[str, float] = {}

    def measure(
        self, weights: Mapping[str, Tensor], energy_changes: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Of each edited weight, and means over them.

        Args:
            weights: name -> edited weight (out x in).
            energy_changes: name -> relative energy change, where it is known already.

        Returns:
            energy_change: (E(W) - E(W_0)) / |E(W_0)|; None where W_0 has no energy. rotation: of the principal
            directions at beta_hse `PLAIN_BETA`, whatever the run's own (see `sphere.hypersphere.rotation`).
            change_norm: ||W - W_0||_F. layers: the same by name.
        """
        known = energy_changes or {}
        layers = {name: self._layer(name, weight, known.get(name)) for name, weight in weights.items()}
        means = {}
        for key in ("energy_change", "rotation", "change_norm"):
            values = [layer[key] for layer in layers.values()]
            means[key] = fmean(v for v in values if v is not None) if None not in values else None
        return {**means, "layers": layers}

    def _layer(self, name: str, weight: Tensor, energy_change: float | None) -> dict[str, float | None]:
        original = self.original.get(name)
        if original is None or original.shape != weight.shape:
            raise SphereError(
                f"The weight '{name}' is not as the unedited one: score checkpoints of one run."
            )
        original, weight = original.to(self.device), weight.to(self.device)
        if name not in self._bases:
            self._bases[name] = _basis(original).cpu()  # in x r
        if energy_change is None:
            if name not in self._energies:
                self._energies[name] = hyperspherical_energy(original)
            before = self._energies[name]
            energy_change = (hyperspherical_energy(weight) - before) / abs(before) if before else None
        basis = _basis(weight)
        change = torch.linalg.vector_norm(weight.float() - original.float(), dtype=torch.float64)
        return {
            "energy_change": energy_change,
            "rotation": rotation(self._bases[name].to(basis), basis),
            "change_norm": float(change),
        }


def _basis(weight: Tensor) -> Tensor:
    """Principal directions (in x r), which know no scale: squares of a broken model's weights overflow without it."""
    peak = float(weight.abs().max())
    return principal_directions(weight.float() / peak if peak else weight, PLAIN_BETA).basis
