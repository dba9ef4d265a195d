"""LyapLock (Wang et al., EMNLP 2025): the weight of preservation is a queue, fed by what the edits so far have cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sphere.errors import SphereError
from sphere.hparams import HParams, require
from sphere.methods.base import TARGET_NUMBERS, Method, Update
from sphere.methods.delivery import Delivery
from sphere.methods.edited_model import EditedModel
from sphere.methods.layerwise import LayerwiseMethod, Solved
from sphere.methods.services import Services
from sphere.requests import EditRequest
from sphere.values.compute_ks import ActivationsPass
from sphere.values.module_residual import module_residual

# Names in a saved state, each followed by "<layer>.<batches>".
_KEYS, _VALUES, _QUEUE, _H, _G = "keys.", "values.", "queue.", "h.", "g."


@dataclass(frozen=True, kw_only=True)
class LyapLockHParams(HParams):
    """LyapLock's keys.

    Attributes:
        preservation_bound: alpha of D = alpha PL_1: the mean preservation loss that is allowed, relative to that after
            the first batch.
    """

    preservation_bound: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("preservation_bound",))


class LyapLock(LayerwiseMethod):
    """Delta = B A^-1, layer after layer on the weights edited so far, with

        A = K K^T + H + q lambda M,    B = R K^T + (G - W H) + q lambda (W_0 - W) M,

    the least of ||R - Delta K||^2 + ||(W + Delta) K_earlier - V_earlier||^2 + q lambda PL(W + Delta). PL(W), the
    preservation loss, is E ||W k - W_0 k||^2 = tr (W - W_0) M (W - W_0)^T; K_earlier are the keys of earlier batches,
    V_earlier what the weight made of them once their batch was written, H = K_earlier K_earlier^T and
    G = V_earlier K_earlier^T. The weight q of preservation is the virtual queue, a Z_t with the published
    a = 1 / sqrt(D) and Z_1 = Z_max = sqrt(D): 1 in the first batch, and after each one

        q <- max(q + PL / D - 1, 1),    D = alpha PL_1,    PL_1 the loss after the first.
    """

    name = "LyapLock"
    reference = "LyapLock: Bounded Knowledge Preservation in Sequential Model Editing, arXiv 2505.15702"
    hparams_class = LyapLockHParams
    tuned: ClassVar[tuple[str, ...]] = (*TARGET_NUMBERS, "mom2_update_weight")
    factors = Method.factors  # what is restored of earlier edits is no sum over the batch's facts

    def __init__(self, edited: EditedModel, services: Services, hparams: LyapLockHParams) -> None:
        super().__init__(edited, services, hparams)
        self.earlier: dict[int, EarlierEdits] = {}
        self._written: dict[int, Tensor] = {}  # layer -> K (in x n) of the batch just written

    def prepare(self) -> None:
        for layer in self.hparams.layers:
            self.earlier.setdefault(layer, EarlierEdits())

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        self._settle()
        targets = self.target_values(requests)  # Z: out x n
        bare = self.services.bare_pass(requests)
        yield from self.deliver(
            self._solved(self.services.activations(requests), bare, targets), bare, targets
        )

    def _solved(
        self, activations: ActivationsPass, bare: ActivationsPass, targets: Tensor
    ) -> Iterator[Solved]:
        """Delta (out x in) of one layer after the other towards Z (out x n), each to be written before the next."""
        for layer in self.hparams.layers:
            keys = activations.compute_ks(layer)  # K: in x n
            asked = self.residual(layer, activations, targets)  # out x n
            residual = module_residual(bare, layer, asked)  # R: out x n
            yield Solved(layer, self._solve(layer, keys, residual), asked)
            self._written[layer] = keys

    def _solve(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        """Delta (out x in, float64) for K (in x n) and R (out x n)."""
        earlier, device = self.earlier[layer], self.services.solve_device(layer)
        keys, residual = keys.to(device).double(), residual.to(device).double()
        if not torch.isfinite(keys).all():
            raise SphereError(
                f"The keys of layer {layer} are not finite: the weights below it may be broken."
            )
        moment = self._moment(layer, device) * (self.hparams.mom2_update_weight * earlier.queue)  # q lambda M
        weight = self._weight(layer, device)
        a = moment + keys @ keys.T  # in x in
        b = residual @ keys.T - (weight - self.edited.original_weight(layer).to(weight)) @ moment  # out x in
        if earlier.n_batches:
            h, g = earlier.h.to(device), earlier.g.to(device)
            a += h
            b += g - weight @ h
        factor, info = torch.linalg.cholesky_ex(a)
        if int(info):  # rounding of a float32 second moment can push its smallest eigenvalues below zero
            a.diagonal().add_(torch.finfo(torch.float32).eps * a.diagonal().max())
            factor, info = torch.linalg.cholesky_ex(a)
        if int(info):
            raise SphereError(
                f"The system of layer {layer} is not positive definite: use a larger mom2_n_samples (more tokens than "
                "in_features) and a positive mom2_update_weight."
            )
        return torch.cholesky_solve(b.T, factor).T.to(keys.device)

    def delivered(self) -> Mapping[str, Delivery]:
        queues = {self.edited.weight_name(layer): earlier.queue for layer, earlier in self.earlier.items()}
        return {name: {**found, "queue": queues[name]} for name, found in super().delivered().items()}

    def _settle(self) -> None:
        """Between two batches: what the batch just written left behind, and the queue after it."""
        for layer, keys in self._written.items():
            device, earlier = self.services.solve_device(layer), self.earlier[layer]
            weight = self._weight(layer, device)
            change = weight - self.edited.original_weight(layer).to(weight)
            loss = float(((change @ self._moment(layer, device)) * change).sum())  # tr D M D^T
            earlier.append(keys.to(device), weight, loss, self.hparams.preservation_bound)
        self._written = {}

    def _moment(self, layer: int, device: torch.device) -> Tensor:
        """M = E[k k^T] (in x in), float64."""
        return self.services.second_moment(layer).to(device).double()

    def _weight(self, layer: int, device: torch.device) -> Tensor:
        """W (out x in) as it stands, float64."""
        return self.edited.weights.get(self.edited.weight_name(layer)).to(device).double()

    def state(self) -> dict[str, Tensor]:
        self._settle()
        saved = super().state()
        for layer, earlier in self.earlier.items():
            saved |= earlier.state(layer)
        return saved

    def keep_state(self, names: Collection[str]) -> None:
        self._written = {}  # `state` was asked for before the batch: nothing else is new
        super().keep_state(names)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for layer in self.hparams.layers:
            device = self.services.solve_device(layer)
            self.earlier[layer] = EarlierEdits.of(layer, state, device)


class EarlierEdits:
    """What a layer's earlier batches left: K and V = W K of each, H = K K^T and G = V K^T over all, and the queue.

    Keys and values are kept as they are until they have more columns than a key has numbers; then H and G take them in,
    so that a saved state does not grow with the edits.

    Attributes:
        queue: q, the weight of preservation.
        first_loss: PL_1; 0 before the first batch.
        n_batches: number of earlier batches.
        h: H (in x in), g: G (out x in), float64, where the solve is done.
    """

    def __init__(self) -> None:
        self.queue, self.first_loss, self.n_batches = 1.0, 0.0, 0
        self.h = self.g = torch.zeros((), dtype=torch.float64)
        self._sums: tuple[Tensor, Tensor] | None = None  # H and G of the batches that are no longer kept
        self._blocks: list[
            tuple[Tensor, Tensor]
        ] = []  # K (in x n) and V (out x n) of those since, on the CPU

    def append(self, keys: Tensor, weight: Tensor, loss: float, bound: float) -> None:
        """Count a batch among the earlier ones.

        Args:
            keys: K (in x n).
            weight: W (out x in) once the batch is written, float64.
            loss: PL(W).
            bound: alpha of D = alpha PL_1.
        """
        keys = keys.float()
        values = (weight @ keys.double()).float()
        self._add(keys, values)
        self._blocks.append((keys.cpu(), values.cpu()))
        self.first_loss = loss if not self.n_batches else self.first_loss
        self.n_batches += 1
        if limit := bound * self.first_loss:
            self.queue = max(self.queue + loss / limit - 1, 1.0)
        if sum(block.shape[1] for block, _ in self._blocks) > len(keys):
            self._sums, self._blocks = (self.h.clone(), self.g.clone()), []

    def _add(self, keys: Tensor, values: Tensor) -> None:
        keys, values = keys.double(), values.double()
        if not self.h.ndim:
            self.h = keys.new_zeros(len(keys), len(keys))
            self.g = keys.new_zeros(len(values), len(keys))
        self.h.addmm_(keys, keys.T)
        self.g.addmm_(values, keys.T)

    def state(self, layer: int) -> dict[str, Tensor]:
        """What a resume point keeps; nothing before the first batch."""
        if not self.n_batches:
            return {}
        done = self.n_batches - len(self._blocks)
        numbers = torch.tensor([self.queue, self.first_loss], dtype=torch.float64)
        saved = {f"{_QUEUE}{layer}.{self.n_batches}": numbers}
        if self._sums:
            saved |= {f"{_H}{layer}.{done}": self._sums[0], f"{_G}{layer}.{done}": self._sums[1]}
        for i, (keys, values) in enumerate(self._blocks, done):
            saved |= {f"{_KEYS}{layer}.{i}": keys, f"{_VALUES}{layer}.{i}": values}
        return saved

    @classmethod
    def of(cls, layer: int, state: Mapping[str, Tensor], device: torch.device) -> EarlierEdits:
        """Those of a saved state, by the very operations that made them."""
        earlier = cls()
        if (n_batches := _number(state, f"{_QUEUE}{layer}.")) is None:
            return earlier
        earlier.n_batches = n_batches
        earlier.queue, earlier.first_loss = state[f"{_QUEUE}{layer}.{n_batches}"].tolist()
        done = _number(state, f"{_H}{layer}.") or 0
        if done:
            earlier._sums = (state[f"{_H}{layer}.{done}"], state[f"{_G}{layer}.{done}"])
            earlier.h, earlier.g = (part.to(device, copy=True) for part in earlier._sums)
        for i in range(done, n_batches):
            block = state[f"{_KEYS}{layer}.{i}"], state[f"{_VALUES}{layer}.{i}"]
            earlier._blocks.append(block)
            earlier._add(*(part.to(device, copy=True) for part in block))
        return earlier


def _number(names: Collection[str], prefix: str) -> int | None:
    """The number behind a prefix that one name has; None where none has it."""
    return next((int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)), None)
