"""How the layers of a model do their arithmetic, for the length of a block. Knows modules; knows nothing of editing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sphere.forward.modules import replaced_forward

SHARED_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"  # read by transformers' SDPA attention at each call
MATMUL_DTYPES = {"model": None, "bfloat16": torch.bfloat16}  # None: the model's own

MEASURED_SIDE = {
    "cpu": 192
}  # of the matrices that are multiplied to see how fast a dtype is: milliseconds each
MEASURED_SIDE_ON_GPU = 2048
MEASURED_TIMES = 4


def slowdown(dtype: torch.dtype, device: torch.device, than: torch.dtype = torch.float32) -> float:
    """How many times as long a matrix product takes in `dtype` as in `than`, by the fastest of a few small ones."""
    if dtype == than:
        return 1.0
    side = MEASURED_SIDE.get(device.type, MEASURED_SIDE_ON_GPU)
    return _seconds(dtype, device, side) / max(_seconds(than, device, side), 1e-9)


def _seconds(dtype: torch.dtype, device: torch.device, side: int) -> float:
    """The fastest of some products of (side x side) matrices; the first one, which warms up, does not count."""
    x = torch.ones(side, side, dtype=dtype, device=device)
    taken = []
    for _ in range(1 + MEASURED_TIMES):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@contextmanager
def multiply_in(dtype: torch.dtype | None, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the linear maps of `layers` multiply in `dtype`; what enters and leaves them keeps its own.

    Args:
        dtype: None changes nothing.
    """
    with ExitStack() as restored:
        for module in chain.from_iterable(layer.modules() for layer in layers):
            if dtype is not None and isinstance(module, nn.Linear | Conv1D):
                restored.enter_context(_multiplying_in(dtype, module))
        yield


def _multiplying_in(dtype: torch.dtype, module: Any) -> AbstractContextManager[None]:
    forward = module.forward

    def lower(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            return forward(x).to(x.dtype)

    return replaced_forward(module, lower)


@contextmanager
def shared_heads(device: torch.device) -> Iterator[None]:
    """Within the block, attention on a CPU reads keys and values that heads share in place.

    Under a mask, transformers copies them for every head first, since kernels of other devices ask for it; on a CPU
    that costs more than the attention itself. Where transformers knows no such switch, nothing changes.
    """
    before = os.environ.get(SHARED_HEADS)
    if device.type == "cpu":
        os.environ[SHARED_HEADS] = "1"
    try:
        yield
    finally:
        os.environ.pop(SHARED_HEADS, None)
        if before is not None:
            os.environ[SHARED_HEADS] = before
