"""BetaEdit (2026): AlphaEdit with a null space that is remade as edits accumulate, and a weight on M."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.hparams import require
from sphere.methods.alphaedit import AlphaEdit, AlphaEditHParams
from sphere.methods.base import Update
from sphere.methods.edited_model import EditedModel
from sphere.methods.null_space import Projector, null_space_projector
from sphere.methods.sequential_solve import Apply, SequentialSolve
from sphere.methods.services import Services
from sphere.requests import EditRequest

# Names in a saved state: how many edits there were, H at the last remaking, and what follows it.
_EDITS, _EARLIER, _SINCE = "edits.", "earlier.", "since_"


@dataclass(frozen=True, kw_only=True)
class BetaEditHParams(AlphaEditHParams):
    """BetaEdit's keys.

    Attributes:
        L1: l1, the weight of M beside the keys of edits.
        tau: edits after which P is remade.
    """

    L1: float = 3000.0
    tau: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("L1", "tau"))


class BetaEdit(AlphaEdit):
    """Delta = R X^T with (P (K K^T + H + l1 M) + l2 I) X = P K, H the sum of K K^T over the earlier batches.

    P is the null-space projector of (H / n + l1 M) / (1 + l1) after n edits, remade every `tau` edits. Between two
    remakings this is the sequential solve with S = P (P (H_0 + l1 M) P + l2 I)^-1 P, c = 1, H_0 being H at the first
    of them. At the latest P is remade when as many edits have followed as a key has numbers: their keys need not be
    kept longer than that.
    """

    name = "BetaEdit"
    reference = "BetaEdit, arXiv 2605.09285"
    hparams_class = BetaEditHParams

    def __init__(self, edited: EditedModel, services: Services, hparams: BetaEditHParams) -> None:
        super().__init__(edited, services, hparams)
        self.earlier: dict[int, Tensor] = {}  # layer -> H_0 (in x in), float64
        self.edits = self.remade_at = 0

    def preconditioner(self, layer: int) -> tuple[Apply, float]:
        h, moment = self.hparams, self.services.second_moment(layer).double()
        earlier = self.earlier.get(layer, torch.zeros((), dtype=moment.dtype)).to(moment.device)
        mixed = (earlier / max(self.remade_at, 1) + h.L1 * moment) / (1 + h.L1)
        projector = null_space_projector(mixed, h.nullspace_threshold)
        self.projectors[layer] = projector
        return restricted(projector, earlier + h.L1 * moment, h.L2, f"layer {layer}"), 1.0

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        yield from super().updates(requests)
        self.edits += len(requests)

    def remake(self) -> None:
        """Between two batches: P, and all that follows from it, from the edits so far."""
        for layer, solve in self.solves.items():
            keys = torch.cat(solve.key_blocks, dim=1).double()  # in x n since the last time
            self.earlier[layer] = self.earlier.get(layer, 0) + keys @ keys.T
        self.remade_at = self.edits
        self._solve_anew()

    def _solve_anew(self) -> None:
        for layer in self.solves:
            apply_s, damping = self.preconditioner(layer)
            self.solves[layer] = SequentialSolve(apply_s, damping, f"layer {layer}")

    @property
    def _due(self) -> bool:
        since = self.edits - self.remade_at
        sizes = [len(solve.key_blocks[0]) for solve in self.solves.values() if solve.key_blocks]
        return bool(sizes) and since >= min(self.hparams.tau, *sizes)

    def state(self) -> dict[str, Tensor]:
        if self._due:
            self.remake()
        prefix = f"{_SINCE}{self.remade_at}/"
        kept = {f"{prefix}{name}": tensor for name, tensor in super().state().items()}
        kept |= {f"{_EARLIER}{layer}.{self.remade_at}": h_0 for layer, h_0 in self.earlier.items()}
        return kept | ({f"{_EDITS}{self.edits}": torch.tensor(self.edits)} if self.edits else {})

    def keep_state(self, names: Collection[str]) -> None:
        self.edits = _number(names, _EDITS)
        super().keep_state(_since(names))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.edits = _number(state, _EDITS)
        for name, tensor in state.items():
            if name.startswith(_EARLIER):
                layer, remade_at = map(int, name.removeprefix(_EARLIER).split("."))
                self.earlier[layer], self.remade_at = tensor.clone(), remade_at
        if self.earlier:
            self._solve_anew()
        super().load_state({name: state[f"{_SINCE}{self.remade_at}/{name}"] for name in _since(state)})


def restricted(projector: Projector, b: Tensor, ridge: float, what: str) -> Apply:
    """K -> P (P B P + l2 I)^-1 P K in float64, with the matrix factorised once.

    Args:
        b: B (in x in), symmetric, float64.
        ridge: l2.
    """
    matrix = projector.apply(projector.apply(b).T)
    matrix.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise SphereError(f"The system of {what} is not positive definite: raise L2.")

    def apply(keys: Tensor) -> Tensor:
        solved = torch.cholesky_solve(projector.apply(keys).to(factor.device), factor)
        return projector.apply(solved.to(keys.device))

    return apply


def _number(names: Collection[str], prefix: str) -> int:
    return max((int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)), default=0)


def _since(names: Collection[str]) -> list[str]:
    """The names of what follows the last remaking, as the sequential solve has them."""
    return [name.partition("/")[2] for name in names if name.startswith(_SINCE)]
