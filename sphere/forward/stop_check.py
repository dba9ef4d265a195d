"""Telling the host how a batched optimisation goes. Knows tensors; knows nothing of what is optimised."""

from __future__ import annotations

import torch
from torch import Tensor

LATE_DEVICES = ("cuda",)  # whose state is read one step later


class StopCheck:
    """Tells the host which requests are open without making a GPU wait: there, it tells of the step before.

    So a request that is done may be computed once more than it need be, which does not change its z.
    """

    def __init__(self, device: torch.device) -> None:
        self.late = device.type in LATE_DEVICES
        self._sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def read(self, alive: Tensor, losses: Tensor) -> tuple[list[bool], float] | None:
        """Which requests are open and the mean loss of all; None where nothing is known yet.

        Args:
            alive: (n,) bool.
            losses: (n,).
        """
        arriving = self._send(torch.cat([alive.to(losses), losses.mean()[None]]))  # n + 1
        if self.late:
            arriving, self._sent = self._sent, arriving
        if arriving is None:
            return None
        values, event = arriving
        if event is not None:
            event.synchronize()
        *flags, mean_loss = values.tolist()
        return [flag > 0 for flag in flags], mean_loss

    def _send(self, state: Tensor) -> tuple[Tensor, torch.cuda.Event | None] | None:
        """Start the copy to the host, and mark in the GPU's queue where it is done."""
        if not torch.cuda.is_available() or state.device.type != "cuda":
            return state, None
        host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        host.copy_(state, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(state.device))
        return host, event
