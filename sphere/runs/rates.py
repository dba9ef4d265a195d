"""What a device does per second in each kind of arithmetic that the plan counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EIGH_FLOPS = 9  # n^3 operations of a symmetric eigendecomposition, vectors included
RATE_SECONDS = 0.15  # that measuring one rate takes


def measure_rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second: matrix products in the model's dtype, float32, float64; an eigendecomposition."""
    cuda = torch.device(device).type == "cuda"
    size = 4096 if cuda else 1024

    def rate(function: Callable[[Tensor], Any], matrix: Tensor, operations: float) -> float:
        function(matrix)
        count, start = 0, time.perf_counter()
        while not count or time.perf_counter() - start < RATE_SECONDS:
            function(matrix)
            count += 1
            if cuda:
                torch.cuda.synchronize(device)
        return count * operations / (time.perf_counter() - start)

    rates = {}
    for kind, wanted in (("model", dtype), ("float32", torch.float32), ("float64", torch.float64)):
        matrix = torch.ones(size, size, dtype=wanted, device=device)
        rates[kind] = rate(lambda m: m @ m, matrix, 2 * size**3)
    small = torch.rand(size // 2, size // 2, device=device)
    rates["eigh"] = rate(torch.linalg.eigh, small @ small.T, EIGH_FLOPS * len(small) ** 3)
    return rates
