"""Update rules: what becomes of a solver's update before it is written. SPHERE is one of them.

A rule maps an update and the weight that it refers to (both out x in) to an update, and says in metrics what it did.
A method lists the rules that each of its updates passes (`each`) and those that condition the total change since the
first edit when it is saved and scored (`total`). Knows nothing of models or solvers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.factors import Factors
from sphere.hypersphere import principal_share, share_inside
from sphere.linalg import largest_singular_value, thin_svd
from sphere.projection import PrincipalDirections, principal_directions, suppress
from sphere.strength import (
    ALPHA_BUDGET,
    AUTO,
    OrAuto,
    check_alpha,
    check_beta,
    check_budget,
    strength_within,
)

Metrics = dict[str, float]


class Rule(Protocol):
    """Turns an update of a weight into another one.

    A rule that refers to the unedited weight W_0 has a method `for_weight(name, original)`, which is called once for
    each edited weight, with W_0 (out x in), and returns the rule that is applied to its updates.

    A rule that is linear in the update may have a method `factored(factors)`, which turns the factors of an update into
    those of what `apply` makes of it, so that a fact can be taken out again; what it needs of the weight as it stands
    and of the update is found once, in `at(delta, weight)`, which returns the rule that is applied.
    """

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        """
        Args:
            delta: update (out x in).
            weight: the weight (out x in) that the update refers to.

        Returns:
            The update to write, and metrics for the log.
        """
        ...


DIRECTIONS = ("current", "original")
RULES = ("rect", "prune", "sphere", "revive", "random")  # as a chain of rules names them
RECT_SHARE = 0.4  # of RECT's entries that are kept, as published
REVIVE_TAU = 0.1  # no value is published in words that could be had; see `Revive`


@dataclass(frozen=True)
class Sphere:
    """SPHERE (arXiv 2510.01172): suppress an update's part in the weight's principal hyperspherical directions.

    Attributes:
        beta_hse: cumulative ratio that decides how many directions are principal; "auto": those above the noise.
        alpha: how strongly they are suppressed; "auto": as much as the budget asks for (`sphere.strength`).
        directions: of the weight as it stands before the update ("current", as published), or of the unedited one
            ("original").
        budget: the fraction of the principal part that edits may put there where `alpha` is "auto".
        fixed: the directions, where they are found.
        original: the unedited weight (out x in), where `alpha` is "auto".
        change: the fraction that it is with the `alpha` found.
        inside: Delta U (out x r) of the update that `alpha` was found for.
    """

    beta_hse: OrAuto
    alpha: OrAuto
    directions: str = "current"
    budget: float = ALPHA_BUDGET
    fixed: PrincipalDirections | None = field(default=None, repr=False)
    original: Tensor | None = field(default=None, repr=False)
    change: float | None = field(default=None, repr=False)
    inside: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_beta(self.beta_hse)
        check_alpha(self.alpha)
        check_budget(self.budget)
        if self.directions not in DIRECTIONS:
            raise SphereError(f"directions must be one of {', '.join(DIRECTIONS)}, got {self.directions!r}.")

    def for_weight(self, name: str, original: Tensor) -> Sphere:
        """The same rule with W_0 (out x in), and with its directions, as far as they are asked for."""
        rule = self if self.alpha != AUTO else replace(self, original=original)
        if self.directions == "current":
            return rule
        return replace(rule, fixed=principal_directions(original, self.beta_hse))

    def at(self, delta: Tensor, weight: Tensor) -> Sphere:
        """The same rule with the directions and the strength that this update of this weight (out x in) meets."""
        directions = self.fixed or principal_directions(weight, self.beta_hse)
        found = replace(self, fixed=directions)
        if self.alpha != AUTO:
            return found
        inside = delta @ directions.basis.to(delta)
        alpha, change = strength_within(
            self.budget, inside, weight, self.original, directions.basis, directions.fraction
        )
        return replace(found, alpha=alpha, change=change, inside=inside)

    def factored(self, factors: Factors) -> Factors:
        """(L R^T) (I - alpha U U^T) = L (R - alpha U U^T R)^T."""
        assert self.fixed is not None
        assert self.alpha != AUTO
        right = suppress(factors.right.T, self.fixed.basis, self.alpha).T
        return Factors(factors.left, right)

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        if self.fixed is None or self.alpha == AUTO:
            return self.at(delta, weight).apply(delta, weight)
        inside = delta @ self.fixed.basis.to(delta) if self.inside is None else self.inside  # out x r
        projected = suppress(delta, self.fixed.basis, self.alpha, inside)
        chosen = {} if self.change is None else {"alpha": self.alpha, "principal_change": self.change}
        return projected, {
            "rank": self.fixed.rank,
            "principal_share_before": share_inside(inside, delta),
            "principal_share_after": principal_share(projected, self.fixed.basis),
            **chosen,
        }


@dataclass(frozen=True)
class Random:
    """The control for SPHERE: as many random orthonormal directions Q in place of the principal ones U.

    Delta <- Delta - a (Delta Q) Q^T with a = alpha ||Delta U|| / ||Delta Q||, so that what is taken away has the norm
    of what SPHERE takes away; a is at most 1, where all of the part in Q's span is gone (`removed` logs the norm taken
    away, relative to SPHERE's). Q is drawn once for each weight; r follows the weight, the first directions stay.

    Attributes:
        beta_hse, alpha, budget: of the SPHERE that it is the control of.
        seed: of the draws.
        original: the unedited weight (out x in), where `alpha` is "auto".
    """

    beta_hse: OrAuto
    alpha: OrAuto
    seed: int = 0
    budget: float = ALPHA_BUDGET
    original: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_beta(self.beta_hse)
        check_alpha(self.alpha)
        check_budget(self.budget)

    def for_weight(self, name: str, original: Tensor) -> Random:
        """The same rule with directions of this weight's own."""
        kept = original if self.alpha == AUTO else None
        return replace(self, seed=zlib.crc32(f"{self.seed} {name}".encode()), original=kept)

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        principal = principal_directions(weight, self.beta_hse)
        generator = torch.Generator().manual_seed(self.seed)
        rows = [torch.randn(weight.shape[1], generator=generator) for _ in range(principal.rank)]
        basis = torch.linalg.qr(torch.stack(rows, dim=1).to(delta)).Q  # in x r
        alpha, chosen, inside = self.alpha, {}, delta @ principal.basis.to(delta)
        if alpha == AUTO:
            alpha, _ = strength_within(
                self.budget, inside, weight, self.original, principal.basis, principal.fraction
            )
            chosen = {"alpha": alpha}
        wanted = alpha * float(inside.norm())
        there = float((delta @ basis).norm())
        strength = min(wanted / there, 1.0) if there else 0.0
        kept = suppress(delta, basis, strength)
        return kept, {
            "rank": principal.rank,
            "principal_share_before": principal_share(delta, principal.basis),
            "principal_share_after": principal_share(kept, principal.basis),
            "removed": strength * there / wanted if wanted else 1.0,
            **chosen,
        }


@dataclass(frozen=True)
class Revive:
    """REVIVE (arXiv 2601.11042): keep an update out of the dominant singular subspaces of the unedited weight.

    With W_0 = U S V^T and k the least number of leading singular values whose sum is above tau of the sum of all,
    Delta <- (I - U_k U_k^T) Delta (I - V_k V_k^T). There is no published code; decided here: singular values, not their
    squares, are summed; both sides are filtered; the subspaces are those of W_0 throughout.

    Attributes:
        tau: fraction of the sum of singular values that counts as dominant.
        left: U_k (out x k).
        right: V_k (in x k).
    """

    tau: float
    left: Tensor | None = field(default=None, repr=False)
    right: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise SphereError(f"tau is a fraction of the singular values' sum in [0, 1), got {self.tau}.")

    def for_weight(self, name: str, original: Tensor) -> Revive:
        """The same rule with the dominant subspaces of W_0 (out x in)."""
        u, s, v = thin_svd(original)
        k = int((s.cumsum(0) <= self.tau * s.sum()).sum()) + 1
        return replace(self, left=u[:, :k].to(original), right=v[:, :k].to(original))

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        if self.left is None or self.right is None:
            raise SphereError("REVIVE refers to the unedited weight: call for_weight first.")
        u, v = self.left.to(delta), self.right.to(delta)
        kept = delta - u @ (u.T @ delta)  # out x in
        kept = kept - (kept @ v) @ v.T
        return kept, {"revive_rank": u.shape[1], "revive_kept_norm": _relative_norm(kept, delta)}

    def factored(self, factors: Factors) -> Factors:
        """(I - U U^T) L ((I - V V^T) R)^T."""
        assert self.left is not None
        assert self.right is not None
        left, right = factors
        u, v = self.left.to(left), self.right.to(right)
        return Factors(left - u @ (u.T @ left), right - v @ (v.T @ right))


@dataclass(frozen=True)
class LargestRelative:
    """RECT (Gu et al. 2024): keep the entries with the largest |Delta / (W + 1e-8)|, zero the others.

    Attributes:
        fraction: of the entries that is kept, per matrix.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise SphereError(
                f"The fraction of entries that RECT keeps must be in (0, 1], got {self.fraction}."
            )

    def apply(self, delta: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        relative = (delta / (weight + 1e-8).to(delta)).abs()  # out x in
        drop = int((1 - self.fraction) * relative.numel())
        kept = delta
        if drop:  # zero what lies below the drop-th smallest; that one and its ties stay, as published
            threshold = relative.reshape(-1).kthvalue(drop).values
            kept = torch.where(relative >= threshold, delta, torch.zeros_like(delta))
        return kept, {"kept_norm_share": _relative_norm(kept, delta)}


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

    def for_weight(self, name: str, original: Tensor) -> RuleSet:
        """The same rules, made ready for one weight.

        Args:
            original: the unedited weight W_0 (out x in).
        """

        def ready(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            bound = (getattr(rule, "for_weight", None) for rule in rules)
            return tuple(make(name, original) if make else r for make, r in zip(bound, rules, strict=True))

        return replace(self, each=ready(self.each), total=ready(self.total))

    def with_directions(self, directions: str) -> RuleSet:
        """The same rules, with SPHERE's directions those of the "current" or the "original" weight."""

        def turned(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            return tuple(replace(r, directions=directions) if isinstance(r, Sphere) else r for r in rules)

        return replace(self, each=turned(self.each), total=turned(self.total))

    def with_budget(self, budget: float) -> RuleSet:
        """The same rules, with this budget where SPHERE's strength, or that of its control, is "auto"."""

        def given(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            return tuple(replace(r, budget=budget) if isinstance(r, Sphere | Random) else r for r in rules)

        check_budget(budget)
        return replace(self, each=given(self.each), total=given(self.total))


def rule_chain(
    names: Sequence[str], hparams: Any, *, beta_hse: OrAuto, alpha: OrAuto, revive_tau: float, seed: int
) -> RuleSet:
    """The rules of these names, one after the other, in place of a method's own.

    Args:
        names: of RULES. With "prune" the chain conditions the total change, as PRUNE does, else each update.
        hparams: of the method; its `rect_share`, `prune_base` and `prune_continue` count where it has them.
        beta_hse: 0 leaves "sphere" and "random" out.

    Raises:
        SphereError: an unknown name, or the same one twice.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise SphereError(f"Unknown rule '{unknown[0]}': use some of {', '.join(RULES)}.", argument="rules")
    if len(set(names)) < len(names):
        raise SphereError(f"A rule is named twice in {', '.join(names)}: name it once.", argument="rules")
    made: dict[str, tuple[Rule, ...]] = {
        "rect": (LargestRelative(getattr(hparams, "rect_share", RECT_SHARE)),),
        "prune": (CondenseSpectrum(getattr(hparams, "prune_base", math.e)),),
        "sphere": sphere_rules(beta_hse, alpha),
        "revive": (Revive(revive_tau),),
        "random": (Random(beta_hse, alpha, seed),) if beta_hse else (),
    }
    chain = tuple(rule for name in names for rule in made[name])
    if "prune" not in names:
        return RuleSet(each=chain)
    conditioned = getattr(hparams, "prune_continue", "") == "conditioned"
    return RuleSet(total=chain, continue_conditioned=conditioned)


class Applied(NamedTuple):
    """An update (out x in) behind a chain of rules, what the rules say, and its factors where it still has some."""

    delta: Tensor
    metrics: Metrics
    factors: Factors | None = None


def apply_rules(
    rules: tuple[Rule, ...], delta: Tensor, weight: Tensor, factors: Factors | None = None
) -> Applied:
    """Pass an update through rules, one after the other; its factors go along through those that are linear."""
    metrics: Metrics = {}
    for rule in rules:
        if found := getattr(rule, "at", None):
            rule = found(delta, weight)
        delta, noted = rule.apply(delta, weight)
        metrics |= noted
        linear = getattr(rule, "factored", None)
        factors = linear(factors) if linear and factors is not None else None
    return Applied(delta, metrics, factors)


def sphere_rules(beta_hse: OrAuto, alpha: OrAuto) -> tuple[Rule, ...]:
    """The SPHERE hook, or nothing where `beta_hse` is 0."""
    check_beta(beta_hse)
    check_alpha(alpha)
    return (Sphere(beta_hse, alpha),) if beta_hse else ()


def _relative_norm(kept: Tensor, delta: Tensor) -> float:
    return float(kept.norm() / delta.norm().clamp(min=1e-30))
