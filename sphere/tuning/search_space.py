"""The numbers that are searched, their ranges, and the units in which they are searched.

A model's hidden states and keys have their own scale. So Adam's steps towards z are searched relative to the hidden
states that z replaces, what is measured in squared keys relative to the spectrum of the second moments E[k k^T] of the
edited layers, and written is the number that a hyperparameter file holds:

    v_lr                   relative to the mean absolute coordinate of h0: Adam moves every coordinate alike
    nullspace_threshold    the fraction of all eigenvalues' sum that lies below it
    L2                     relative to E||k||^2, the mean over the layers of the eigenvalues' sum

Knows hyperparameters and spectra. Knows nothing of scores or of how trials are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.hparams import HParams

# Number -> its range in its unit, on a logarithmic scale; widened where the start lies outside.
RANGES: dict[str, tuple[float, float]] = {
    "v_lr": (0.02, 1.0),
    "clamp_norm_factor": (0.25, 5.0),
    "kl_factor": (0.005, 0.5),
    "mom2_update_weight": (50.0, 50000.0),
    "nullspace_threshold": (0.005, 0.9),
    "L2": (0.003, 10.0),
}
BY_SPECTRUM = ("nullspace_threshold", "L2")
DIGITS = 4  # significant ones of what is tried and written
MARGIN = 1.001  # more than their rounding


class Suggests(Protocol):
    """What a search asks for a value (`optuna.Trial`)."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...


class Spectrum:
    """The eigenvalues of E[k k^T] of all edited layers together.

    Args:
        moments: (in x in) each.
    """

    def __init__(self, moments: Sequence[Tensor]) -> None:
        wide = [moment.to(torch.promote_types(moment.dtype, torch.float32)) for moment in moments]
        each = [torch.linalg.eigvalsh(moment).double().cpu().clamp(min=0) for moment in wide]  # ascending
        self.values = torch.cat(each).sort().values
        total = float(self.values.sum())
        self.mass = self.values.cumsum(0) / total  # fraction of the sum in the first i + 1
        self.mean_square = total / len(moments)  # E||k||^2
        self.floor = max(float(values[0]) for values in each)  # above it every layer has a null space

    def fraction_below(self, threshold: float) -> float:
        """Fraction of the eigenvalues' sum in those below the threshold, or below the least one that can be used."""
        count = int(((self.values < threshold) | (self.values <= self.floor)).sum())
        return float(self.mass[count - 1])

    def threshold_at(self, fraction: float) -> float:
        """The threshold below which this fraction of the sum lies at most, and with which all layers can be edited."""
        count = max(int((self.mass <= fraction).sum()), 1)
        below, above = float(self.values[count - 1]), float(self.values[min(count, len(self.values) - 1)])
        between = (below + above) / 2 if above > below else MARGIN * above
        return max(between, MARGIN * self.floor)


class SearchSpace:
    """The numbers of a method that are searched around a start.

    Args:
        start: hyperparameters that the search begins with; a number that is 0 there stays 0.
        names: which numbers (`Method.tuned`).
        coordinate: the mean absolute coordinate of h0; may be None where `v_lr` is not searched.
        spectrum: of the edited layers; may be None where no number needs it.

    Raises:
        SphereError: a number that is not among the fields of `start` or has no range.
    """

    def __init__(
        self,
        start: HParams,
        names: Sequence[str],
        coordinate: float | None = None,
        spectrum: Spectrum | None = None,
    ) -> None:
        known = {field.name for field in fields(start)}
        if strange := [name for name in names if name not in known or name not in RANGES]:
            raise SphereError(
                f"{', '.join(strange)} of {type(start).__name__} cannot be searched: name numbers among "
                f"{', '.join(RANGES)}."
            )
        self.start, self.coordinate, self.spectrum = start, coordinate, spectrum
        self.ranges: dict[str, tuple[float, float]] = {}
        for name in names:
            if (value := self._in_unit(name)) > 0:
                low, high = RANGES[name]
                if name == "nullspace_threshold":
                    low = max(low, self._of(name).fraction_below(0.0))
                self.ranges[name] = min(low, value), max(high, value)

    @property
    def start_params(self) -> dict[str, float]:
        """The start, in the units of the search."""
        return {name: self._in_unit(name) for name in self.ranges}

    def suggest(self, trial: Suggests) -> dict[str, float]:
        """A trial's values, in the units of the search."""
        return {
            name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in self.ranges.items()
        }

    def hparams(self, params: Mapping[str, float]) -> HParams:
        """The hyperparameters that values in the units of the search stand for."""
        found: dict[str, Any] = {name: self._in_file(name, value) for name, value in params.items()}
        return replace(self.start, **found)

    def numbers(self, hparams: HParams) -> dict[str, float]:
        """The searched numbers, as a file holds them."""
        return {name: getattr(hparams, name) for name in self.ranges}

    def _in_unit(self, name: str) -> float:
        value = float(getattr(self.start, name))
        if name == "nullspace_threshold":
            return self._of(name).fraction_below(value)
        return value / self._unit(name)

    def _in_file(self, name: str, value: float) -> float:
        if name == "nullspace_threshold":
            value = self._of(name).threshold_at(value)
        else:
            value *= self._unit(name)
        return float(f"{value:.{DIGITS}g}")

    def _unit(self, name: str) -> float:
        """What one unit of the search is in a file."""
        if name == "L2":
            return self._of(name).mean_square
        if name != "v_lr":
            return 1.0
        if self.coordinate is None:
            raise SphereError(f"{name} is searched relative to the coordinates of h0: give their mean.")
        return self.coordinate

    def _of(self, name: str) -> Spectrum:
        if self.spectrum is None:
            raise SphereError(f"{name} is searched relative to the second moments' spectrum: give that.")
        return self.spectrum


def needs_spectrum(names: Sequence[str]) -> bool:
    """Whether one of these numbers is searched relative to the spectrum."""
    return any(name in BY_SPECTRUM for name in names)
