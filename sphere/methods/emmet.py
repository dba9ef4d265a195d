"""EMMET (Gupta et al. 2024): MEMIT's preconditioner in the equality-constrained form of ROME, for whole batches."""

from __future__ import annotations

from dataclasses import dataclass

from sphere.hparams import HParams, require
from sphere.methods.memit import MEMIT
from sphere.methods.sequential_solve import Apply, inverse_moment


@dataclass(frozen=True, kw_only=True)
class EmmetHParams(HParams):
    """EMMET's keys.

    Attributes:
        lambda_e: damping of the equality constraint; the smaller, the more exactly the keys get their values.
        mom2_ridge: mu of C = lambda M + mu I.
    """

    lambda_e: float = 0.1
    mom2_ridge: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("lambda_e",), not_negative=("mom2_ridge",))


class EMMET(MEMIT):
    """Delta = R (K^T C^-1 K + lambda_e I)^-1 K^T C^-1 (eq. 12), with C = lambda M + mu I.

    Of all updates with Delta K = R, for lambda_e -> 0, that which changes the preserved keys least. By Woodbury's
    identity it is X = (lambda_e C + K K^T)^-1 K: MEMIT's solve, damped by lambda_e in place of 1. Layers and rules are
    MEMIT's; nothing is remembered from batch to batch.
    """

    name = "EMMET"
    reference = "A Unified Framework for Model Editing, arXiv 2403.14236"
    hparams_class = EmmetHParams

    def preconditioner(self, layer: int) -> tuple[Apply, float]:
        h, moment = self.hparams, self.services.second_moment(layer)
        return inverse_moment(moment, h.mom2_update_weight, f"layer {layer}", h.mom2_ridge), h.lambda_e
