"""The editing loop, once for all methods: ask a method for updates, pass them through the rules, write them.

Knows nothing of files or datasets (`sphere.run`) and nothing of how a method finds its updates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.hparams import ModuleHParams
from sphere.methods import Workspace, get_method
from sphere.requests import EditRequest, check_batch
from sphere.rules import Figures, apply_rules

log = logging.getLogger(__name__)

# An update this many times larger than its weight (Frobenius) is no edit but a broken solve.
LARGEST_RELATIVE_UPDATE = 10.0


@dataclass(frozen=True)
class BatchReport:
    """What one batch did.

    Attributes:
        n_edits: edits written so far, this batch included.
        seconds: wall time of the batch.
        layers: weight name -> figures of its update (norm, rank r, principal shares, ...).
        findings: sentences on repeated or conflicting requests.
    """

    n_edits: int
    seconds: float
    layers: dict[str, Figures]
    findings: list[str] = field(default_factory=list)


class Editor:
    """Edits a model batch after batch.

    Args:
        method: a name of `sphere.methods.available_methods()`.
        hparams: hyperparameters of the method's class.
        beta_hse: cumulative ratio of the SPHERE hook; 0 switches it off.
        alpha: suppression strength of the hook.
        options: further fields of `Workspace` (seed, stats_dir, batch_tokens, conserve_memory, ...).

    Raises:
        SphereError: an unknown method, or hyperparameters that do not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: str,
        hparams: ModuleHParams,
        *,
        beta_hse: float = 0.5,
        alpha: float = 0.5,
        **options: Any,
    ) -> None:
        kind = get_method(method)
        if "stats_dir" in options:
            options["stats_dir"] = Path(options["stats_dir"])
        self.rules = kind.rules(hparams, beta_hse, alpha)
        self.workspace = Workspace(model, tokenizer, hparams, **options)
        self.weights = self.workspace.weights
        self.method = kind(self.workspace, hparams)
        self.original = self.weights.snapshot("cpu" if self.workspace.conserve_memory else None)
        self.n_edits = 0

    def edit(self, requests: Sequence[EditRequest]) -> BatchReport:
        """Write one batch of requests into the model.

        Raises:
            SphereError: bad requests, or an update that is not finite or absurdly large; the batch and the layer are
                named and the weights are as they were before the batch.
        """
        if not requests:
            raise SphereError("There is nothing to edit: give at least one request.")
        findings = check_batch(requests)
        start = time.perf_counter()
        before = self.weights.snapshot()
        layers: dict[str, Figures] = {}
        try:
            self._continue_conditioned()
            for name, delta in self.method.updates(requests):
                figures = self._write(name, delta, requests)
                layers[name] = {**layers.get(name, {}), **figures}
        except BaseException:
            self.weights.restore(before)
            raise
        self.n_edits += len(requests)
        seconds = time.perf_counter() - start
        log.info("%d edits in %.1f s, %d in all.", len(requests), seconds, self.n_edits)
        return BatchReport(self.n_edits, seconds, layers, findings)

    def _write(self, name: str, delta: Tensor, requests: Sequence[EditRequest]) -> Figures:
        """Pass one update through the rules and add it to its weight."""
        weight = self.weights.get(name)
        where = f"{name} in the batch of cases {requests[0].case_id} to {requests[-1].case_id}"
        if not torch.isfinite(delta).all():
            raise SphereError(
                f"The update of {where} is not finite: the batch was not written; raise L2 or mom2_update_weight, or "
                "use --dtype float32."
            )
        delta, figures = apply_rules(self.rules.each, delta.to(weight), weight)
        size, norm = float(delta.norm()), float(weight.norm())
        if not size <= LARGEST_RELATIVE_UPDATE * norm:
            raise SphereError(
                f"The update of {where} has norm {size:.3g} against {norm:.3g} of the weight: the batch was not "
                "written; the model is breaking, use fewer edits, a stronger --alpha or a larger L2."
            )
        self.weights.add_(name, delta)
        return {"delta_norm": size, "weight_norm": norm, **figures}

    def _continue_conditioned(self) -> None:
        if self.rules.total and self.rules.continue_conditioned and self.n_edits:
            self.weights.restore(self._conditioned())

    def _conditioned(self) -> dict[str, Tensor]:
        """W_0 + conditioned (W - W_0), in the model's own orientation."""
        result = {}
        for name in self.weights.names:
            now = self.weights.get(name)
            original = self.weights.canonical(name, self.original[name]).to(now)
            total, _ = apply_rules(self.rules.total, now - original, original)
            result[name] = self.weights.canonical(name, original + total).contiguous()  # turned back
        return result

    def final_weights(self) -> dict[str, Tensor]:
        """What is saved and scored: the weights under edit, conditioned where the method says so.

        In the model's own orientation and dtype, on the CPU.
        """
        if not self.rules.total or not self.n_edits:
            return self.weights.stored()
        with self.weights.temporarily():
            self.weights.restore(self._conditioned())
            return self.weights.stored()

    def revert(self) -> None:
        """Put the original weights back, bit for bit, and forget all edits."""
        self.weights.restore(self.original)
        self.n_edits = 0
        self.method = type(self.method)(self.workspace, self.method.hparams)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that later batches depend on: tensors, and a small JSON-able part."""
        tensors = {f"weight/{k}": v for k, v in self.weights.snapshot("cpu").items()}
        tensors |= {f"method/{k}": v for k, v in self.method.state().items()}
        tensors["rng"] = torch.get_rng_state()
        return tensors, {"n_edits": self.n_edits}

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take up a state saved by `state` on the same model."""
        device = self.workspace.stack.device
        self.method.prepare()  # on the unedited model
        self.method.load_state(
            {k.removeprefix("method/"): v.to(device) for k, v in tensors.items() if k.startswith("method/")}
        )
        self.weights.restore(
            {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
        )
        torch.set_rng_state(tensors["rng"])
        self.n_edits = int(state["n_edits"])
