"""ROME (Meng et al., NeurIPS 2022): one fact at a time, a rank-one update that maps a key to a new value."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sphere.errors import SphereError
from sphere.factors import Factors
from sphere.hparams import HParams
from sphere.methods.base import TARGET_NUMBERS, Method, Update
from sphere.methods.delivery import DELIVERED, DISTANCE, Delivery, delivery
from sphere.methods.edited_model import EditedModel
from sphere.methods.sequential_solve import Apply, inverse_moment
from sphere.methods.services import Services
from sphere.requests import EditRequest
from sphere.values.compute_z import TargetValues
from sphere.values.module_residual import contribution, module_residual


@dataclass(frozen=True, kw_only=True)
class RomeHParams(HParams):
    """ROME's keys: one layer; u is M^-1 k, or k where `mom2_adjustment` is false.

    Attributes:
        mom2_update_weight: not used (u is normalised); there so that files of MEMIT's shape load.
        context_template_length_params: not used; files of other projects hold it. The contexts are those of the run.
    """

    mom2_update_weight: float = 1.0
    context_template_length_params: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 1:
            raise SphereError(f"layers must name one layer for ROME, got {list(self.layers)}.")
        if self.z_rescale:
            raise SphereError(
                "z_rescale must be false for ROME, whose facts have no batch to take the norm from."
            )


class ROME(Method):
    """Delta = (v* - W k) u^T / (k^T u) with u = M^-1 k_mean (eq. 2), one fact written after the other.

    k is the key of the bare prompt, k_mean its mean over all context templates. v* = W k + delta, with delta optimised
    as for target values z, but at the edited module's output m = W k (+ bias), which is also what the clamp and the
    weight decay refer to (eq. 4). Where the layer adds the module's output to the residual stream, this delta is a
    delta at the layer's output, and the optimisation of z does the work with its two norms rescaled from ||h0|| to
    ||m||. Where the layer scales the module's output, or lets it pass a norm, m stands for what it adds to the layer's
    output, and the delta found there is brought back to the module's output (`sphere.values.module_residual`).
    """

    name = "ROME"
    reference = "Locating and Editing Factual Associations in GPT, arXiv 2202.05262"
    hparams_class = RomeHParams
    at_once = 1
    tuned: ClassVar[tuple[str, ...]] = TARGET_NUMBERS

    def __init__(self, edited: EditedModel, services: Services, hparams: RomeHParams) -> None:
        super().__init__(edited, services, hparams)
        self.layer = hparams.layers[0]
        self.direction: Apply | None = None  # k -> u, up to its length
        self._delivered: list[Delivery] = []  # one for each fact of a batch
        self._factors: Factors | None = None  # of the update that was yielded last

    def prepare(self) -> None:
        if self.direction is not None:
            return
        if not self.hparams.mom2_adjustment:
            self.direction = lambda key: key
            return
        inverse = inverse_moment(self.services.second_moment(self.layer), 1.0, f"layer {self.layer}")
        self.direction = lambda key: inverse(key.double())

    def prepared_from(self) -> dict[str, str]:
        adjusted = self.hparams.mom2_adjustment
        return {"second_moments": self.services.second_moments.digest()} if adjusted else {}

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        name, self._delivered = self.edited.weight_name(self.layer), []
        bar = tqdm(requests, desc=self.name, unit="fact", leave=False, disable=not self.services.progress)
        for request in bar:
            yield from self.one(name, request)

    def one(self, name: str, request: EditRequest) -> Iterator[Update]:
        """The update of one fact; once it is written, what it did for z is noted."""
        contexts = [template for group in self.services.context_templates for template in group]
        activations = self.services.activations([request], [contexts])
        bare = self.services.bare_pass([request])
        k_mean, k = activations.compute_ks(self.layer), bare.compute_ks(self.layer)  # in x 1 each
        m = module_output(self.edited.module(self.layer), k[:, 0].double())  # out
        added = contribution(bare, self.layer, m)  # d
        found = self._optimise(request, added, activations.outputs(self.layer)[:, 0])
        asked, before = (found.z - found.h0).T, bare.outputs(self.layer)  # d x 1 each
        delta = module_residual(bare, self.layer, asked)  # out x 1
        yield name, self.rank_one(request, k_mean, k, delta)
        after, eps = bare.outputs(self.layer), torch.finfo(self.edited.model.dtype).eps
        self._delivered.append(delivery(found.z.T, before, before, after, asked, eps))

    def delivered(self) -> Mapping[str, Delivery]:
        """Those of the batch's facts, averaged over the facts whose z asks for anything."""
        mean: Delivery = {}
        for key in (DISTANCE, DELIVERED):
            told = [value for metrics in self._delivered if (value := metrics[key]) is not None]
            mean[key] = statistics.fmean(told) if told else None
        return {self.edited.weight_name(self.layer): mean}

    def factors(self) -> Factors | None:
        return self._factors

    def rank_one(self, request: EditRequest, k_mean: Tensor, k: Tensor, delta: Tensor) -> Tensor:
        """Delta (out x in), float64, which maps k (in x 1) to W k + delta (out x 1)."""
        assert self.direction is not None
        u = self.direction(k_mean)[:, 0].double()  # in
        u = u / u.norm()
        product = k[:, 0].double() @ u
        if not product.abs() > 1e-6 * k.double().norm():
            raise SphereError(
                f"The key of case {request.case_id} is orthogonal to its update's direction u: set mom2_adjustment to "
                "false, or use a larger mom2_n_samples."
            )
        self._factors = Factors(delta.double() / product, u[:, None])
        return torch.outer(delta[:, 0].double(), u) / product

    def _optimise(self, request: EditRequest, m: Tensor, h0: Tensor) -> TargetValues:
        """z and h0 (1 x d each), with the clamp and the weight decay of m (d,), which the module adds to h0 (d,)."""
        ratio = float(m.norm() / h0.norm())
        rescaled = replace(
            self.hparams,
            clamp_norm_factor=self.hparams.clamp_norm_factor * ratio,
            v_weight_decay=self.hparams.v_weight_decay / ratio**2,
        )
        return self.services.compute_z([request], rescaled, progress=False)


@torch.no_grad()
def module_output(module: nn.Module, key: Tensor) -> Tensor:
    """The edited module's output (out,) for a key (in,), bias included; float32 or wider."""
    weight: Any = module.weight
    output = module(key.to(weight)[None])[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))
