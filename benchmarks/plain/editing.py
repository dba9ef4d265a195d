"""AlphaEdit with SPHERE the plain way: the loop over batches and layers, made of this folder's other modules.

Laid out as in the published code of AlphaEdit: target values request by request; then, layer after layer, keys and
residuals by forward passes through the whole model, a dense solve, the projection of the update, the write; after the
batch the keys of all layers once more, for the cache C that later batches are solved with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.plain import keys as plain_keys
from benchmarks.plain import projection, solves
from benchmarks.plain.target_values import plain_target_values
from sphere.methods.alphaedit import AlphaEditHParams
from sphere.requests import EditRequest
from sphere.weights import EditedWeights


class PlainEditor:
    """Edits a model batch after batch, as `sphere.Editor` does with AlphaEdit.

    Args:
        templates: groups of context templates.
        projectors: layer -> P (in x in) of the unedited model, see `solves.projector`.
        beta_hse: cumulative ratio of the SPHERE hook.
        alpha: suppression strength of the hook.

    Attributes:
        weights: those under edit, (out x in) each.
        caches: layer -> C (in x in), the sum of K K^T over earlier batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hparams: AlphaEditHParams,
        templates: Sequence[Sequence[str]],
        projectors: Mapping[int, Tensor],
        *,
        beta_hse: float,
        alpha: float,
    ) -> None:
        self.model, self.tokenizer, self.hparams, self.templates = model, tokenizer, hparams, templates
        self.beta_hse, self.alpha = beta_hse, alpha
        self.names = {layer: f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers}
        self.weights = EditedWeights(model, list(self.names.values()))
        self.projectors = {
            layer: p.to(self.weights.get(self.names[layer])) for layer, p in projectors.items()
        }
        self.caches = {layer: torch.zeros_like(p) for layer, p in self.projectors.items()}

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Write one batch of requests into the model."""
        layers = self.hparams.layers
        found = plain_target_values(self.model, self.tokenizer, requests, self.templates, self.hparams)
        targets = found.z.T  # out x n
        for index, layer in enumerate(layers):
            keys = self.keys(layer, requests)
            residual = (targets - self.outputs(requests)) / (len(layers) - index)
            self.write(layer, self.solve(layer, keys, residual))
        for layer in layers:
            self.remember(layer, self.keys(layer, requests))

    def keys(self, layer: int, requests: Sequence[EditRequest]) -> Tensor:
        """K (in x n) of a layer on the weights as they stand."""
        module = self.model.get_submodule(self.hparams.rewrite_module_tmp.format(layer))
        found = plain_keys.keys(self.model, self.tokenizer, module, requests, self.templates)
        return found.to(self.projectors[layer])

    def outputs(self, requests: Sequence[EditRequest]) -> Tensor:
        """What the last edited layer gives for the bare prompts on the weights as they stand: (out x n)."""
        last = self.model.get_submodule(self.hparams.layer_module_tmp.format(max(self.hparams.layers)))
        return plain_keys.outputs(self.model, self.tokenizer, last, requests)

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        """Delta (out x in) for K (in x n) and R (out x n)."""
        x = solves.alphaedit(self.projectors[layer], keys, self.caches[layer], self.hparams.L2)  # in x n
        return residual.to(x) @ x.T

    def write(self, layer: int, delta: Tensor) -> None:
        """Project Delta (out x in) away from the weight's principal directions and add it."""
        name = self.names[layer]
        projected = projection.project_update(delta, self.weights.get(name), self.beta_hse, self.alpha)
        self.weights.add_(name, projected)

    def remember(self, layer: int, keys: Tensor) -> None:
        """C + K K^T for the keys K (in x n) of a batch that was written."""
        self.caches[layer] += keys @ keys.T
