"""Wall time of a long computation by stage, without a change to its code.

A `StageClock` counts; `timed` has it count within the block whenever some functions are called. Knows nothing of what
is computed.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.common import synchronize


class Place(NamedTuple):
    """A function by the class or module that holds it, and the stage that its time belongs to."""

    owner: Any
    name: str
    stage: str


class StageClock:
    """Seconds by stage. Where stages nest, time counts for the inner one alone: they add up to the whole.

    Args:
        device: waited for at the end of each stage.
        kept: stages whose first result is kept.

    Attributes:
        seconds: stage -> seconds so far.
        first: stage -> what its first call returned, for the stages of `kept`.
    """

    def __init__(self, device: torch.device, kept: Collection[str] = ()) -> None:
        self.device, self.kept = device, kept
        self.seconds: dict[str, float] = defaultdict(float)
        self.first: dict[str, Any] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block belongs to a stage."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Put the time since the last change on the innermost stage's account."""
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def timed(places: Sequence[Place], clock: StageClock) -> Iterator[None]:
    """Within the block the calls of some functions are stages; of a generator, each of its steps."""
    with ExitStack() as stack:
        for owner, name, stage in places:
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), stage, clock)))
        yield


def _timed(function: Callable[..., Any], stage: str, clock: StageClock) -> Callable[..., Any]:
    """The function, or generator function, with its time on a clock."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.stage(stage):
            result = function(*args, **kwargs)
        if stage in clock.kept:
            clock.first.setdefault(stage, result)
        return result

    @functools.wraps(function)
    def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
        iterator, end = function(*args, **kwargs), object()
        while True:
            with clock.stage(stage):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    return steps if inspect.isgeneratorfunction(function) else call
