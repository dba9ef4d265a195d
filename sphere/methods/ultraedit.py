"""UltraEdit (Gu et al., 2025): a forward and a backward pass per fact; no target values, subject or statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.hparams import ModuleHParams, require
from sphere.methods.base import Method, Update
from sphere.methods.edited_model import EditedModel
from sphere.methods.module_gradients import module_gradients
from sphere.methods.services import Services
from sphere.methods.teacher_forcing import TeacherForcing
from sphere.requests import EditRequest
from sphere.values.joiner import Continued

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UltraEditHParams(ModuleHParams):
    """UltraEdit's keys.

    Attributes:
        lr: eta, the length of a step in units of the standardised gradient.
        ridge: of the solve (the paper's 1).
        batch_size: facts per forward and backward pass.
    """

    lr: float
    ridge: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("lr", "ridge", "batch_size"))


@dataclass(frozen=True)
class RunningMoments:
    """Mean and deviation of all rows so far, never changed in place.

    Attributes:
        count: number of rows.
        mean: (features,), float64.
        squares: (features,), the sum of squared differences from the mean, float64.
    """

    count: int
    mean: Tensor
    squares: Tensor

    def with_rows(self, x: Tensor) -> RunningMoments:
        """These moments with further rows x (N x features), by Chan's update."""
        count, mean = len(x), x.mean(dim=0)
        total, shift = self.count + count, mean - self.mean
        squares = self.squares + (x - mean).square().sum(dim=0) + shift**2 * (self.count * count / total)
        return RunningMoments(total, self.mean + shift * (count / total), squares)

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / deviation (N x features); 0 where a feature has never varied."""
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return torch.where(deviation > 0, (x - self.mean) / deviation, 0.0)


class UltraEdit(Method):
    """Delta = V^T H (H^T H + I)^-1 with a row of H and V for every token of a batch's answers.

    h (in) is what the edited module is given at the position that predicts the token, g (out) the gradient of the
    answer's mean negative log-likelihood at what the module puts out there. Mean and deviation over all facts so far,
    this batch's included, standardise (h, g) to (h^, g^); then v = -eta ||h^||^2 g^. So the module's output at h moves
    by v, as far as the ridge allows. H holds h as it is, which is what the module will be given again.
    """

    name = "UltraEdit"
    reference = "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing, arXiv 2505.14679"
    hparams_class = UltraEditHParams
    uses_subject = False

    def __init__(self, edited: EditedModel, services: Services, hparams: UltraEditHParams) -> None:
        super().__init__(edited, services, hparams)
        self.moments: dict[int, RunningMoments] = {}
        self._before: dict[int, RunningMoments] = {}  # of the batch that is being written

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self._before, found = self.moments, self.moments.copy()
        for layer, (h, g) in self.rows(requests).items():
            rows = torch.cat([h, g], dim=1)  # N x (in + out)
            zeros = torch.zeros_like(rows[0])
            found[layer] = found.get(layer, RunningMoments(0, zeros, zeros)).with_rows(rows)
            if found[layer].count == 1:
                log.warning("The first batch has one answer token only, which has no deviation: no update.")
            h_hat, g_hat = found[layer].standardise(rows).split([h.shape[1], g.shape[1]], dim=1)
            v = -self.hparams.lr * h_hat.square().sum(dim=1, keepdim=True) * g_hat  # N x out
            yield self.edited.weight_name(layer), v.T @ ridge_rows(h, self.hparams.ridge)
        self.moments = found

    def rows(self, requests: Sequence[EditRequest]) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer -> h (N x in) and g (N x out), float64, a row for every token of the answers."""
        edited, size = self.edited, self.hparams.batch_size
        pairs = [Continued(edited.asked(r.text), r.target_new, r.joiner) for r in requests]
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.hparams.layers}
        for start in range(0, len(pairs), size):
            batch = TeacherForcing.of(edited.stack, edited.tokenizer, pairs[start : start + size])
            at = batch.score_row, batch.score_position
            for layer, of_layer in module_gradients(batch, edited.stack).items():
                h, g = (t[at[0].to(t.device), at[1].to(t.device)].double() for t in of_layer)
                parts[layer].append((h, g))
        return {
            layer: (torch.cat([h for h, _ in its]), torch.cat([g for _, g in its]))
            for layer, its in parts.items()
        }

    def state(self) -> dict[str, Tensor]:
        return {
            f"moments.{layer}.{its.count}": torch.stack([its.mean, its.squares]).cpu()
            for layer, its in self.moments.items()
        }

    def keep_state(self, names: Collection[str]) -> None:
        if not self.state().keys() <= set(names):
            self.moments = self._before

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            _, layer, count = name.split(".")
            mean, squares = tensor.to(self.edited.layer_device(int(layer)))
            self.moments[int(layer)] = RunningMoments(int(count), mean, squares)


def ridge_rows(h: Tensor, ridge: float) -> Tensor:
    """H (H^T H + ridge I)^-1 (N x in) for H (N x in), by whichever of the two Gram matrices is the smaller."""
    n, in_features = h.shape
    gram = h @ h.T if n < in_features else h.T @ h
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(h, factor) if n < in_features else torch.cholesky_solve(h.T, factor).T
