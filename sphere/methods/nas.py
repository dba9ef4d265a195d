"""NAS (Liu et al., 2026): AlphaEdit towards target values of the norm that they have on the unedited model."""

from __future__ import annotations

from dataclasses import dataclass

from sphere.errors import SphereError
from sphere.methods.alphaedit import AlphaEdit, AlphaEditHParams


@dataclass(frozen=True, kw_only=True)
class NasHParams(AlphaEditHParams):
    """AlphaEdit's keys, with `z_rescale`."""

    z_rescale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.z_rescale:
            raise SphereError("z_rescale must be true for NAS: without it, it is AlphaEdit.")


class NAS(AlphaEdit):
    """AlphaEdit's solve, with v* = v_0 + delta rescaled to an anchor (`sphere.values.z_rescale`)."""

    name = "NAS"
    reference = "Norm Anchors Make Model Edits Last, arXiv 2602.02543"
    hparams_class = NasHParams
