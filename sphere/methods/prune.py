"""PRUNE (Ma et al., ICLR 2025): MEMIT batches accumulate; the total change is conditioned when saved and scored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sphere.errors import SphereError
from sphere.hparams import HParams
from sphere.methods.memit import MEMIT
from sphere.rules import CondenseSpectrum, RuleSet, sphere_rules
from sphere.strength import OrAuto

CONTINUE = ("unconditioned", "conditioned")


@dataclass(frozen=True, kw_only=True)
class PruneHParams(HParams):
    """PRUNE's keys.

    Attributes:
        prune_base: base of the logarithm (the paper uses e and 1.2).
        prune_continue: the weights on which later batches are solved: "unconditioned", as published, or "conditioned".
    """

    prune_base: float = math.e
    prune_continue: str = "unconditioned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_continue not in CONTINUE:
            raise SphereError(f"prune_continue must be one of {CONTINUE}, got {self.prune_continue!r}.")


class MEMITPrune(MEMIT):
    """MEMIT's solve; T = W_now - W_0 has its large singular values condensed, then SPHERE with W_0's directions."""

    name = "MEMIT_prune"
    reference = "Perturbation-Restrained Sequential Model Editing, arXiv 2405.16821"
    hparams_class = PruneHParams

    @classmethod
    def rules(cls, hparams: PruneHParams, beta_hse: OrAuto, alpha: OrAuto) -> RuleSet:
        return RuleSet(
            total=(CondenseSpectrum(hparams.prune_base), *sphere_rules(beta_hse, alpha)),
            continue_conditioned=hparams.prune_continue == "conditioned",
        )
