"""Several processes at one job, as `torchrun` or `accelerate launch` start them: data parallel, one model in each.

A list of independent things (requests whose target values are wanted, records to score) is cut into one share per
process; every process gets the results of all. Everything else each process does alike, and what they must agree on
to the bit (sampled templates, weights after a batch) is the first one's. Process group, devices and transport are
accelerate's; what is added here is that an error in any process is an error in all of them, so that none waits for
one that is gone. A single process is the case of size 1, and pays nothing.

Knows nothing of models or editing.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from sphere.errors import SphereError

R = TypeVar("R")
T = TypeVar("T")

# The first process may compute statistics for hours while the others wait. One that dies is noticed at once.
WAIT = timedelta(hours=12)


@dataclass
class Processes:
    """This process among `size` that do the same job.

    Every process must come to the same calls in the same order.

    Attributes:
        index: this one's number; 0 is the main one, which writes files and talks to the user.
        device: where this process' model belongs, as `load_model` takes it.
    """

    index: int = 0
    size: int = 1
    device: str = "auto"
    _over: bool = field(default=False, repr=False)  # an error was exchanged: nobody waits any more

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.index == 0

    def shares(self, function: Callable[[Sequence[T]], R], items: Sequence[T]) -> list[R]:
        """`function` of each process' contiguous share of `items`, computed there; all results in order, everywhere.

        Args:
            function: its result must be picklable, with tensors on the CPU. Not called for an empty share.

        Raises:
            SphereError: the error of whichever process had one.
        """
        if self.size == 1:
            return [function(items)] if len(items) else []
        share, rest = divmod(len(items), self.size)
        start = self.index * share + min(self.index, rest)
        own = items[start : start + share + (self.index < rest)]
        found = self._exchange(lambda: [function(own)] if len(own) else [])
        return [result for results in found for result in results]

    def on_main(self, function: Callable[[], R]) -> R:
        """`function` called in the main process only, while the others wait; its result, everywhere.

        Raises:
            SphereError: its error, everywhere.
        """
        if self.size == 1:
            return function()
        found = self._exchange(lambda: function() if self.main else None)[0]
        return found  # type: ignore[return-value]

    def from_main(self, tensor: Tensor) -> Tensor:
        """The main process' values of a tensor that has the same shape, dtype and device type everywhere."""
        if self.size == 1:
            return tensor
        from accelerate.utils import broadcast

        self._exchange(lambda: None)  # nobody waits for a process that failed before
        return broadcast(tensor.clone(memory_format=torch.contiguous_format))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the whole job: an error of one process that the others do not meet themselves ends them, too."""
        self._over = False
        try:
            yield
        except Exception as error:
            self._finish(error)
            raise
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self.size == 1 or self._over:
            return

        def outcome() -> None:
            if error:
                raise error

        self._exchange(outcome)

    def _exchange(self, function: Callable[[], R]) -> list[R]:
        """What `function` returned in each process; an error in any is raised in all."""
        from accelerate.utils import gather_object

        own, result = None, None
        try:
            result = function()
        except Exception as error:
            own = error
        try:
            outcomes = gather_object([(result, own and self._sentence(own))])
        except RuntimeError as error:
            self._over = True
            raise own or SphereError("Another process of this job is gone: see its own message.") from error
        failed = [sentence for _, sentence in outcomes if sentence]
        if failed:
            self._over = True
            raise own or SphereError(failed[0])
        return [result for result, _ in outcomes]

    def _sentence(self, error: Exception) -> str:
        if isinstance(error, SphereError):
            return str(error)
        return f"Process {self.index} failed ({type(error).__name__}: {error})."


def start(device: str = "auto", device_map: object = None) -> Processes:
    """The processes that `torchrun` or `accelerate launch` started, or a single one without them.

    Each process gets the GPU of its local number, unless `device` is "cpu" or there is none. All but the main one
    are silent.

    Raises:
        SphereError: a device or a device_map that several processes cannot share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes(device=device)
    if device_map is not None:
        raise SphereError(
            "device_map spreads one model over all devices, torchrun starts one model per process: use one of them.",
            argument="device_map",
        )
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda"):
        from sphere.models import resolve_device  # loads transformers

        resolve_device(device)
    if index:
        raise SphereError(
            f"Device {device} would put every process on one device: give auto, cuda or cpu with torchrun.",
            argument="device",
        )
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=WAIT)
    atexit.register(state.destroy_process_group)
    if not state.is_main_process:
        _be_silent()
    return Processes(state.process_index, state.num_processes, "cpu" if on_cpu else str(state.device))


def _be_silent() -> None:
    from transformers.utils import logging as transformers_logging

    logging.getLogger("sphere").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
