"""Update rules: what becomes of a solver's update before it is written. SPHERE is one of them.

A rule maps an update and the weight that it refers to (both out x in) to an update, and says in metrics what it did.
A method lists the rules that each of its updates passes (`each`) and those that condition the total change since the
first edit when it is saved and scored (`total`). Knows nothing of models or solvers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.hypersphere import principal_share
from sphere.linalg import largest_singular_value
from sphere.projection import check_alpha, check_beta, principal_directions, suppress

Metrics = dict[str, float]


class Rule(Protocol):
    """Turns an update of a weight into another one."""

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        """
        Args:
            delta: update (out x in).
            weight: the weight (out x in) that the update refers to.

        Returns:
            The update to write, and metrics for the log.
        """
        ...


@dataclass(frozen=True)
class Sphere:
    """SPHERE (arXiv 2510.01172): suppress an update's part in the weight's principal hyperspherical directions.

    Attributes:
        beta_hse: cumulative ratio that decides how many directions are principal.
        alpha: how strongly they are suppressed.
    """

    beta_hse: float
    alpha: float

    def __post_init__(self) -> None:
        check_beta(self.beta_hse)
        check_alpha(self.alpha)

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        directions = principal_directions(weight, self.beta_hse)
        projected = suppress(delta, directions.basis, self.alpha)
        return projected, {
            "rank": directions.rank,
            "principal_share_before": principal_share(delta, directions.basis),
            "principal_share_after": principal_share(projected, directions.basis),
        }


@dataclass(frozen=True)
class LargestRelative:
    """RECT (Gu et al. 2024): keep the entries with the largest |Delta / (W + 1e-8)|, zero the others.

    Attributes:
        share: part of the entries that is kept, per matrix.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SphereError(f"The share of entries that RECT keeps must be in (0, 1], got {self.share}.")

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        relative = (delta / (weight + 1e-8).to(delta)).abs()  # out x in
        drop = int((1 - self.share) * relative.numel())
        kept = delta
        if drop:  # zero what lies below the drop-th smallest; that one and its ties stay, as published
            threshold = relative.reshape(-1).kthvalue(drop).values
            kept = torch.where(relative >= threshold, delta, torch.zeros_like(delta))
        return kept, {"kept_norm_share": float(kept.norm() / delta.norm().clamp(min=1e-30))}


@dataclass(frozen=True)
class CondenseSpectrum:
    """PRUNE (Ma et al. 2024): singular values of the total change above the original weight's largest are condensed.

    s > m becomes log(s) - log(m) + m, with m the largest singular value of W_0.

    Attributes:
        base: of the logarithm.
    """

    base: float = math.e

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise SphereError(f"The base of PRUNE's logarithm must be above 1, got {self.base}.")

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        largest = largest_singular_value(weight.to(delta))
        if largest_singular_value(delta) <= largest:  # no decomposition where there is nothing to condense
            return delta, {"condensed": 0}
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        condensed = (s.clamp(min=1e-30).log() - largest.log()) / math.log(self.base) + largest
        above = s > largest
        return (u * torch.where(above, condensed, s)) @ vh, {"condensed": int(above.sum())}


@dataclass(frozen=True)
class RuleSet:
    """The rules of a run.

    Attributes:
        each: every update passes through these, with the weight as it stands just before the update.
        total: W - W_0 passes through these, with W_0, whenever the weights are saved or scored.
        continue_conditioned: whether later batches are solved on the conditioned weights.
    """

    each: tuple[Rule, ...] = ()
    total: tuple[Rule, ...] = ()
    continue_conditioned: bool = field(default=False)


def apply_rules(rules: tuple[Rule, ...], delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
    """Pass an update through rules, one after the other."""
    metrics: Metrics = {}
    for rule in rules:
        delta, noted = rule.apply(delta, weight)
        metrics |= noted
    return delta, metrics


def sphere_rules(beta_hse: float, alpha: float) -> tuple[Rule, ...]:
    """The SPHERE hook, or nothing where `beta_hse` is 0."""
    check_beta(beta_hse)
    check_alpha(alpha)
    return (Sphere(beta_hse, alpha),) if beta_hse else ()
