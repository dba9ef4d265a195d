"""What each batch did to the edited weights, for the run's log and for TensorBoard.

Metrics come from `sphere.hypersphere`; this module knows when to ask for them and against which reference: the
energy of the unedited weight, which a resumed run reads from `edit_0`. Knows nothing of methods or models.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.hypersphere import PLAIN_BETA, hyperspherical_energy, layer_report, principal_share
from sphere.projection import principal_directions
from sphere.rules import Metrics

BEFORE, AFTER = "principal_share_before", "principal_share_after"


class Monitor:
    """Measures edited weights after a batch; `measure` is what `Editor.edit` takes.

    Args:
        reference: name -> unedited weight (out x in).
        every: measure after every so-many-th batch; 0 or below: never.
        s: exponent of the hyperspherical energy.
        device: where the reference energies are computed; by default where the reference is.

    Raises:
        SphereError: a reference without hyperspherical energy (fewer than two non-zero rows).
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        every: int = 1,
        s: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        self.every = every
        self.s = s
        self.reference_energy: dict[str, float] = {}
        if every > 0:
            self.reference_energy = {
                name: hyperspherical_energy(weight.to(device or weight.device), s)
                for name, weight in reference.items()
            }
        for name, energy in self.reference_energy.items():
            if energy == 0:
                raise SphereError(
                    f"'{name}' has fewer than two non-zero rows and so no hyperspherical energy: log "
                    "none, with log_energy_every 0.",
                    argument="log_energy_every",
                )

    def due(self, batch: int) -> bool:
        """Whether to measure after this batch (counted from 0)."""
        return self.every > 0 and (batch + 1) % self.every == 0

    def measure(self, name: str, weight: Tensor, before: Tensor, known: Metrics) -> dict[str, Any]:
        """Metrics of one weight after a batch; every value is JSON-able.

        Args:
            weight: W (out x in) after the batch.
            before: W before it (for PRUNE, which conditions the total change: the unedited W).
            known: what the rules said; a SPHERE hook has said rank and principal shares.

        Returns:
            energy; energy_change, relative to the unedited weight's; condition (None where infinite). Without a hook
            also rank (r at beta_hse = `PLAIN_BETA`, of the weight before the batch) and principal_share_before =
            principal_share_after, of the change that was written.
        """
        metrics: dict[str, Any] = layer_report(weight, before, self.reference_energy[name], s=self.s)
        del metrics["delta_norm"]  # the editing loop has it, also for batches that are not measured
        if BEFORE not in known:
            directions = principal_directions(before, PLAIN_BETA)
            share = principal_share(weight - before, directions.basis)
            metrics |= {"rank": directions.rank, BEFORE: share, AFTER: share}
        return metrics


class TensorBoardWriter:
    """The same metrics as TensorBoard events: one scalar `<weight>/<metric>` per batch, over the number of edits.

    Args:
        folder: where the event files go.
        after: edits already done; events of later steps that an interrupted run left are hidden.

    Raises:
        SphereError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def add(self, n_edits: int, seconds: float, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """The metrics of one batch, at once on disk."""
        self._writer.add_scalar("batch/seconds", seconds, n_edits)
        for name, metrics in layers.items():
            for key, value in metrics.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._writer.add_scalar(f"{name}/{key}", value, n_edits)
        self._writer.flush()

    def close(self) -> None:
        """No more batches."""
        self._writer.close()


def check_tensorboard() -> None:
    """Raise a SphereError unless tensorboard can be imported."""
    if importlib.util.find_spec("tensorboard") is None:
        raise SphereError(
            "The TensorBoard log needs the package tensorboard: run `pip install tensorboard`.",
            argument="tensorboard",
        )
