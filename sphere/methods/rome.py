"""ROME (Meng et al., NeurIPS 2022): one fact at a time, a rank-one update that maps a key to a new value."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.forward.modules import inference
from sphere.hparams import HParams
from sphere.methods.base import TARGET_NUMBERS, Method, Update
from sphere.methods.edited_model import EditedModel
from sphere.methods.sequential_solve import Apply, inverse_moment
from sphere.methods.services import Services
from sphere.requests import EditRequest
from sphere.values.context_templates import BARE
from sphere.values.tokenization import encode

log = logging.getLogger(__name__)

PROBE = 1e-1  # size of the probe, relative to the hidden state
PROBE_TEXT = "The sky is"
PROBE_TOLERANCE = 1e-2  # relative error of a probe that counts as "adds to the residual stream"


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


class ROME(Method):
    """Delta = (v* - W k) u^T / (k^T u) with u = M^-1 k_mean (eq. 2), one fact written after the other.

    k is the key of the bare prompt, k_mean its mean over all context templates. v* = W k + delta, with delta optimised
    as for target values z, but at the edited module's output m = W k (+ bias), which is also what the clamp and the
    weight decay refer to (eq. 4). The layer adds the module's output to the residual stream, so this delta is a delta
    at the layer's output, and the optimisation of z does the work with its two norms rescaled from ||h0|| to ||m||.
    Whether the layer does add it is measured; a model with a norm behind its MLP is refused.
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

    def prepare(self) -> None:
        if self.direction is not None:
            return
        check_adds_to_stream(self.edited.stack, self.edited.tokenizer, self.layer)
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
        name = self.edited.weight_name(self.layer)
        bar = tqdm(requests, desc=self.name, unit="fact", leave=False, disable=not self.services.progress)
        for request in bar:
            yield name, self.rank_one(request)

    def rank_one(self, request: EditRequest) -> Tensor:
        """Delta (out x in) of one fact, on the weights as they stand; float64."""
        assert self.direction is not None
        contexts = [template for group in self.services.context_templates for template in group]
        activations = self.services.activations([request], [contexts])
        k_mean = activations.compute_ks(self.layer)  # in x 1
        h0 = activations.outputs(self.layer)  # d x 1
        k = self.services.activations([request], [(BARE,)]).compute_ks(self.layer)[:, 0].double()  # in
        delta = self._optimise(request, module_output(self.edited.module(self.layer), k), h0[:, 0])
        u = self.direction(k_mean)[:, 0].double()  # in
        u = u / u.norm()
        product = k @ u
        if not product.abs() > 1e-6 * k.norm():
            raise SphereError(
                f"The key of case {request.case_id} is orthogonal to its update's direction u: set mom2_adjustment to "
                "false, or use a larger mom2_n_samples."
            )
        return torch.outer(delta.double(), u) / product

    def _optimise(self, request: EditRequest, m: Tensor, h0: Tensor) -> Tensor:
        """delta (d,) at the module's output m (d,), found at the layer's output h0 (d,)."""
        ratio = float(m.norm() / h0.norm())
        rescaled = replace(
            self.hparams,
            clamp_norm_factor=self.hparams.clamp_norm_factor * ratio,
            v_weight_decay=self.hparams.v_weight_decay / ratio**2,
        )
        found = self.services.compute_z([request], rescaled, progress=False)
        return (found.z - found.h0)[0]


@torch.no_grad()
def module_output(module: nn.Module, key: Tensor) -> Tensor:
    """The edited module's output (out,) for a key (in,), bias included; float32 or wider."""
    weight: Any = module.weight
    output = module(key.to(weight)[None])[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))


@torch.no_grad()
def check_adds_to_stream(stack: LayerStack, tokenizer: Any, layer: int) -> None:
    """Measure that a change of the edited module's output is the same change of the layer's output.

    Raises:
        SphereError: it is not (a norm or a factor behind the MLP): ROME's value cannot be optimised there.
    """
    ids = torch.tensor([encode(tokenizer, PROBE_TEXT).ids], device=stack.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    probe: list[Tensor] = []

    def shift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        direction = torch.randn(output.shape[-1], generator=generator).to(output)
        probe.append(PROBE * float(recording.hidden[:, -1].norm()) * direction / direction.norm())
        return output + probe[-1]

    with inference(stack.model):
        recording = stack.record(inputs, layer, layer)
        plain = stack.run(recording, recording.hidden, layer, layer)
        handle = stack.rewrite[layer].register_forward_hook(shift)
        try:
            shifted = stack.run(recording, recording.hidden, layer, layer)
        finally:
            handle.remove()
    change = (shifted - plain)[0, -1].float()
    wanted = probe[0].float().to(change.device)
    # What the layer's dtype cannot resolve is no evidence: its rounding is counted in.
    rounding = 4 * torch.finfo(plain.dtype).eps * float(plain[0, -1].float().norm())
    error = float((change - wanted).norm())
    if error > PROBE_TOLERANCE * float(wanted.norm()) + rounding:
        raise SphereError(
            f"Layer {layer} of {type(stack.model).__name__} does not add the output of '"
            f"{stack.hparams.rewrite_module_tmp.format(layer)}' to the residual stream as it is (a norm behind it?): "
            "ROME does not fit this model; use AlphaEdit or MEMIT."
        )
