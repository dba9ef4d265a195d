"""RECT (Gu et al., EMNLP 2024): MEMIT's update, of which only the largest relative changes are kept."""

from __future__ import annotations

from dataclasses import dataclass

from sphere.hparams import HParams
from sphere.methods.memit import MEMIT
from sphere.rules import RECT_SHARE, LargestRelative, RuleSet, sphere_rules
from sphere.strength import OrAuto


@dataclass(frozen=True, kw_only=True)
class RectHParams(HParams):
    """RECT's keys.

    Attributes:
        rect_share: part of a matrix' entries that is kept.
    """

    rect_share: float = RECT_SHARE


class MEMITRect(MEMIT):
    """MEMIT's solve; the 40 % of entries with the largest |Delta / (W + 1e-8)| are written, then SPHERE acts."""

    name = "MEMIT_rect"
    reference = "Model Editing Harms General Abilities of Large Language Models, arXiv 2401.04700"
    hparams_class = RectHParams

    @classmethod
    def rules(cls, hparams: RectHParams, beta_hse: OrAuto, alpha: OrAuto) -> RuleSet:
        return RuleSet(each=(LargestRelative(hparams.rect_share), *sphere_rules(beta_hse, alpha)))
