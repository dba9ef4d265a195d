"""ENCORE (Gupta et al., 2025): MEMIT_seq with a bound on the norm of an update, and z that stops early."""

from __future__ import annotations

from dataclasses import dataclass

from sphere.hparams import HParams, require
from sphere.methods.memit import MEMITSeq
from sphere.methods.sequential_solve import Apply, inverse_moment


@dataclass(frozen=True, kw_only=True)
class EncoreHParams(HParams):
    """ENCORE's keys.

    Attributes:
        mom2_ridge: mu of C = lambda M + mu I, the weight of ||Delta||^2. The shipped files have `z_stop`, too.
    """

    mom2_ridge: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, not_negative=("mom2_ridge",))


class ENCORE(MEMITSeq):
    """Delta = R K^T (lambda M + mu I + H + K K^T)^-1, H the sum of K K^T over the earlier batches.

    The least of ||R - Delta K||^2 + lambda ||Delta K_0||^2 + ||Delta K_earlier||^2 + mu ||Delta||^2.
    """

    name = "ENCORE"
    reference = "Lifelong Knowledge Editing requires Better Regularization, arXiv 2502.01636"
    hparams_class = EncoreHParams

    def preconditioner(self, layer: int) -> tuple[Apply, float]:
        h, moment = self.hparams, self.services.second_moment(layer)
        return inverse_moment(moment, h.mom2_update_weight, f"layer {layer}", h.mom2_ridge), 1.0
