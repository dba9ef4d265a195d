"""The change of an edited model as factors of one rank: what every form of LoRA adapter holds.

With the edits' own rank an adapter is exact; with a smaller one it is the best of that rank. Knows changes of weights.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.export.edited import EditedRun
from sphere.factors import Factors
from sphere.low_rank import Decomposition, converted, padded, rounding_norm

SUGGESTED_RANK = 64  # whose error is named where no rank is given and none is exact


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of a model.

    Attributes:
        factors: weight name -> factors (out x k, in x k) of its change, all of the same k, on the CPU.
        lines: sentences on how near it comes to the edits.
    """

    factors: dict[str, Factors]
    lines: list[str]

    @property
    def rank(self) -> int:
        """k."""
        return next(iter(self.factors.values())).left.shape[1]


def adapter_of(run: EditedRun, rank: int | None = None, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter that makes the edited model of the unedited one.

    Args:
        rank: of the adapter; None: the smallest that is exact.
        dtype: of its factors.

    Raises:
        SphereError: there are no edits; or no rank is given, and none that is smaller than the weights is exact.
    """
    if not run.n_edits:
        raise SphereError(
            "An adapter of no edits changes nothing: choose a checkpoint.", argument="checkpoint"
        )
    if rank is not None and rank < 1:
        raise SphereError(f"The rank of an adapter is at least 1, got {rank}.", argument="rank")
    found = {name: Decomposition(run.change(name)) for name in run.edited}
    exact = {name: _exact_rank(run, name, change) for name, change in found.items()}
    full = [name for name, own in exact.items() if own is None]
    if full and rank is None:
        raise SphereError(
            f"The change of {len(full)} of {len(found)} weights is not of low rank, as that of RECT and FT is not, "
            f"and an exact adapter would be as large as the weights. The best adapter of rank {SUGGESTED_RANK} "
            f"is off by {_errors(found, dict.fromkeys(found, SUGGESTED_RANK))} of the change: give a rank.",
            argument="rank",
        )
    ranks = {
        name: min(x for x in (rank, exact[name], min(c.shape)) if x is not None) for name, c in found.items()
    }
    most = max(ranks.values())
    factors = {name: converted(padded(c.factors(ranks[name]), most), dtype) for name, c in found.items()}
    lines = [f"A LoRA adapter of rank {most} for {len(found)} weights."]
    if all(ranks[name] == exact[name] for name in found):
        rounded = "" if dtype.itemsize >= 4 else f", but for its factors' own, which are {str(dtype)[6:]}"
        lines.append(f"It is exact: what it leaves of the edits' change is no more than rounding{rounded}.")
    else:
        lines.append(
            f"It is the best of its rank, with a relative error of {_errors(found, ranks)} of the change of the weight."
        )
        if full:
            lines.append(f"The edits' change is not of low rank in {len(full)} of {len(found)} weights.")
    return Adapter(factors, lines)


def adapted(run: EditedRun, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The unedited weights with an adapter added, in the model's own orientation and dtype."""
    weights = {}
    for name, original in run.original.items():
        change = run.weights.canonical(name, factors[name].delta())  # turned back
        weights[name] = (original.double() + change).to(original.dtype).contiguous()
    return weights


def _exact_rank(run: EditedRun, name: str, change: Decomposition) -> int | None:
    stored = run.edited[name].dtype
    writes = (
        run.n_edits if torch.finfo(stored).bits >= 32 else 1
    )  # of less than 32 bits only the sum is rounded
    return change.exact_rank(run.n_edits, rounding_norm(run.edited[name], stored, writes))


def _errors(found: Mapping[str, Decomposition], ranks: Mapping[str, int]) -> str:
    """Relative errors in words."""
    return ", ".join(f"{100 * change.error(ranks[name]):.2g} % ({name})" for name, change in found.items())
