"""The update rules of a method under the settings of an editor or of a run. Knows methods and rules only."""

from __future__ import annotations

from collections.abc import Sequence

from sphere.hparams import ModuleHParams
from sphere.methods.base import Method
from sphere.rules import RuleSet, rule_chain
from sphere.strength import OrAuto


def chosen_rules(
    kind: type[Method],
    hparams: ModuleHParams,
    *,
    rules: Sequence[str] | None,
    beta_hse: OrAuto,
    alpha: OrAuto,
    alpha_budget: float,
    directions: str,
    revive_tau: float,
    seed: int,
) -> RuleSet:
    """A method's own rules, or the chain of names that takes their place; the arguments are those of `Editor`.

    Raises:
        SphereError: an unknown rule or directions, or a number out of its range.
    """
    names = (hparams.rules or None) if rules is None else rules
    own = kind.rules(hparams, beta_hse, alpha)
    if names is not None:
        own = rule_chain(names, hparams, beta_hse=beta_hse, alpha=alpha, revive_tau=revive_tau, seed=seed)
    return own.with_directions(directions).with_budget(alpha_budget)
