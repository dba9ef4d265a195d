"""How many directions of a weight count as principal: where its spectrum is cut (`sphere.linalg.Cut`).

Eigenvalues are those of W_hat^T W_hat, lambda_i = sigma_i^2, m = min(out, in) of them. Knows tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sphere.linalg import Cut
from sphere.strength import AUTO, OrAuto

GRID = 1 << 14  # points of the Marchenko-Pastur density; its median is then exact to about 1e-9


def cut_of(beta_hse: OrAuto) -> Cut:
    """The cut that `beta_hse` asks for."""
    if isinstance(beta_hse, str):
        assert beta_hse == AUTO
        return above_noise
    return lambda values, shape: at_ratio(values, shape, beta_hse)


def at_ratio(values: Tensor, shape: Sequence[int], beta_hse: float) -> tuple[int, float]:
    """r = #{i : (lambda_1 + ... + lambda_i) / (lambda_1 + ... + lambda_m) <= beta_hse} + 1, as SPHERE has it."""
    ratio = values.cumsum(0) / values.sum()
    if beta_hse > 1 - max(shape) * torch.finfo(torch.float32).eps:  # the numerical rank could decide r
        return int((ratio <= beta_hse).sum()) + 1, 0.0
    return int((ratio <= beta_hse).sum()) + 1, float((ratio - beta_hse).abs().min())


def above_noise(values: Tensor, shape: Sequence[int]) -> tuple[int, float]:
    """r = #{i : sigma_i > tau}, at least 1, with the optimal hard threshold tau for singular values in white noise.

    Gavish and Donoho 2014 (arXiv 1305.5870), section III.E, for a noise level that is not known: tau = omega(m / n)
    median(sigma), m the smaller side and n the larger one.
    """
    tau = noise_factor(min(shape) / max(shape)) * values.sqrt().quantile(0.5)
    above = (values.sqrt() > tau).sum()
    return max(int(above), 1), float((values - tau.square()).abs().min() / values[0])


@cache
def noise_factor(aspect: float) -> float:
    """omega(aspect) = lambda*(aspect) / sqrt(median of the Marchenko-Pastur law), aspect in (0, 1].

    Gavish and Donoho 2014, equations 4 and 5; omega(1) = 2.858.
    """
    root = math.sqrt(aspect**2 + 14 * aspect + 1)
    threshold = math.sqrt(2 * (aspect + 1) + 8 * aspect / (aspect + 1 + root))  # lambda*
    # The density sqrt((high - x) (x - low)) / (2 pi aspect x) from (1 - sqrt(aspect))^2 to (1 + sqrt(aspect))^2, in t.
    t = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (math.pi / GRID)
    x = 1 + aspect - 2 * math.sqrt(aspect) * t.cos()
    mass = (t.sin().square() / x).cumsum(0)
    return threshold / math.sqrt(float(x[torch.searchsorted(mass, mass[-1] / 2)]))
