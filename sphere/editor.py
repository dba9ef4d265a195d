"""The editing loop, once for all methods: ask a method for updates, pass them through the rules, write them.

Knows nothing of files or datasets (`sphere.runs.run`) and nothing of how a method finds its updates.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from sphere.rules import Metrics, apply_rules

log = logging.getLogger(__name__)

# An update this many times larger than its weight (Frobenius) is no edit but a broken solve.
LARGEST_RELATIVE_UPDATE = 10.0
# Prefixes of what a saved state holds.
_WEIGHT, _RNG = "weight/", "rng/"

# (name, weight after, weight before, metrics known already) -> further metrics; weights (out x in).
Measure = Callable[[str, Tensor, Tensor, Metrics], Mapping[str, Any]]


@dataclass(frozen=True)
class BatchReport:
    """What one batch did.

    Attributes:
        n_edits: edits written so far, this batch included.
        seconds: wall time of the batch, without measuring.
        layers: weight name -> metrics: delta_norm, the Frobenius norm of the batch's change; weight_norm; what the
            rules say (rank r, principal shares, ...; the mean where a weight got several updates); what was measured.
        warnings: sentences on repeated or conflicting requests.
        measure_seconds: wall time of measuring (see `sphere.runs.monitor`); 0 where nothing was measured.
    """

    n_edits: int
    seconds: float
    layers: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    measure_seconds: float = 0.0


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
        options |= {key: Path(options[key]) for key in ("stats_dir", "cache_dir") if options.get(key)}
        self.rules = kind.rules(hparams, beta_hse, alpha)
        self.workspace = Workspace(model, tokenizer, hparams, **options)
        self.weights = self.workspace.weights
        self.method = kind(self.workspace, hparams)
        self.original = self.weights.snapshot("cpu" if self.workspace.conserve_memory else None)
        self.n_edits = 0

    def edit(self, requests: Sequence[EditRequest], measure: Measure | None = None) -> BatchReport:
        """Write one batch of requests into the model.

        Args:
            measure: asked for further metrics of each edited weight once the batch is written, e.g.
                `sphere.runs.monitor.Monitor.measure`. Where a method conditions the total change (PRUNE) it is shown
                what is saved: the conditioned weight, beside the original one.

        Raises:
            SphereError: bad requests, or an update that is not finite or absurdly large; the batch and the layer are
                named and the weights are as they were before the batch.
        """
        if not requests:
            raise SphereError("There is nothing to edit: give at least one request.")
        warnings = check_batch(requests)
        start = time.perf_counter()
        before = self.weights.snapshot("cpu" if self.workspace.conserve_memory else None)
        known = self.method.state().keys()
        noted: dict[str, list[Metrics]] = {}
        try:
            self._continue_conditioned()
            for name, delta in self.method.updates(requests):
                noted.setdefault(name, []).append(self._write(name, delta, requests))
            self._agree()
            layers: dict[str, dict[str, Any]] = {name: _mean(metrics) for name, metrics in noted.items()}
            for name, metrics in layers.items():
                now = self.weights.get(name)
                change = now - self.weights.canonical(name, before[name]).to(now)
                metrics["delta_norm"] = float(change.norm())
            seconds = time.perf_counter() - start
            if measure:
                self._measure(measure, layers, before)
        except BaseException:
            self.weights.restore(before)
            self.method.keep_state(known)
            raise
        self.n_edits += len(requests)
        log.info("%d edits in %.1f s, %d in all.", len(requests), seconds, self.n_edits)
        measuring = time.perf_counter() - start - seconds if measure else 0.0
        return BatchReport(self.n_edits, seconds, layers, warnings, measuring)

    def _agree(self) -> None:
        """Where several processes edit alike: take the main one's weights, so that rounding never parts them."""
        processes = self.workspace.processes
        if processes.size > 1:
            for name in self.weights.names:
                self.weights.set_(name, processes.from_main(self.weights.get(name)))

    def _measure(
        self, measure: Measure, layers: dict[str, dict[str, Any]], before: Mapping[str, Tensor]
    ) -> None:
        """Add measured metrics to those of each weight."""
        conditioned, noted = self._conditioned() if self.rules.total else ({}, {})
        for name, metrics in layers.items():
            metrics.update(noted.get(name, {}))
            after = self.weights.get(name)
            if name in conditioned:
                after = self.weights.canonical(name, conditioned[name])
            earlier = self.original[name] if name in conditioned else before[name]
            earlier = self.weights.canonical(name, earlier).to(after)
            metrics.update(measure(name, after, earlier, metrics))

    def _write(self, name: str, delta: Tensor, requests: Sequence[EditRequest]) -> Metrics:
        """Pass one update through the rules and add it to its weight."""
        weight = self.weights.get(name)
        where = f"{name} in the batch of cases {requests[0].case_id} to {requests[-1].case_id}"
        if not torch.isfinite(delta).all():
            raise SphereError(
                f"The update of {where} is not finite: the batch was not written; raise L2 or mom2_update_weight, or "
                "use --dtype float32."
            )
        delta, metrics = apply_rules(self.rules.each, delta.to(weight), weight)
        size, norm = float(delta.norm()), float(weight.norm())
        if not size <= LARGEST_RELATIVE_UPDATE * norm:
            raise SphereError(
                f"The update of {where} has norm {size:.3g} against {norm:.3g} of the weight: the batch was not "
                "written; the model is breaking, use fewer edits, a stronger --alpha or a larger L2."
            )
        self.weights.add_(name, delta)
        if not self.weights.is_finite(name):
            raise SphereError(
                f"The update of {where} leaves a weight that is not finite in the model's dtype: the batch was not "
                "written; use --dtype bfloat16 or float32."
            )
        return {"weight_norm": norm, **metrics}

    def _continue_conditioned(self) -> None:
        if self.rules.total and self.rules.continue_conditioned and self.n_edits:
            self.weights.restore(self._conditioned()[0])

    def _conditioned(self) -> tuple[dict[str, Tensor], dict[str, Metrics]]:
        """W_0 + conditioned (W - W_0), in the model's own orientation, and the rules' metrics by weight."""
        result, noted = {}, {}
        for name in self.weights.names:
            now = self.weights.get(name)
            original = self.weights.canonical(name, self.original[name]).to(now)
            total, noted[name] = apply_rules(self.rules.total, now - original, original)
            result[name] = self.weights.canonical(name, original + total).contiguous()  # turned back
        return result, noted

    def final_weights(self) -> dict[str, Tensor]:
        """What is saved and scored: the weights under edit, conditioned where the method says so.

        In the model's own orientation and dtype, on the CPU.
        """
        if not self.rules.total or not self.n_edits:
            return self.weights.stored()
        with self.weights.temporarily():
            self.weights.restore(self._conditioned()[0])
            return self.weights.stored()

    def revert(self) -> None:
        """Put the original weights back, bit for bit, and forget all edits."""
        self.weights.restore(self.original)
        self.n_edits = 0
        self.method = type(self.method)(self.workspace, self.method.hparams)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Everything that later batches depend on.

        Returns:
            What changes with every batch (weights under edit, random state); what stays as it is under its name (the
            method's own state); a small JSON-able part.
        """
        tensors = {f"{_WEIGHT}{name}": weight for name, weight in self.weights.snapshot("cpu").items()}
        tensors |= {f"{_RNG}{device}": state for device, state in _random_state().items()}
        return tensors, self.method.state(), {"n_edits": self.n_edits}

    def load_state(
        self, tensors: Mapping[str, Tensor], append_only: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Take up a saved `state` on the same, unedited model."""
        self.method.prepare()  # on the unedited model
        self.method.load_state(append_only)
        self.weights.restore(
            {k.removeprefix(_WEIGHT): v for k, v in tensors.items() if k.startswith(_WEIGHT)}
        )
        _set_random_state({k.removeprefix(_RNG): v for k, v in tensors.items() if k.startswith(_RNG)})
        self.n_edits = int(state["n_edits"])


def _random_state() -> dict[str, Tensor]:
    """State of PyTorch's generators, by device: nothing else is drawn from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _mean(metrics: Sequence[Metrics]) -> dict[str, Any]:
    """The metrics of a weight's update; the mean of each where there were several updates."""
    if len(metrics) == 1:
        return dict(metrics[0])
    return {key: statistics.fmean(f[key] for f in metrics) for key in metrics[0]}
