"""The rules of a run, ready for each of its weights, and what those that condition the total change make of it.

Knows weights and rules. Knows nothing of methods or batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from sphere.rules import Metrics, RuleSet, apply_rules
from sphere.weights import EditedWeights


class ReadyRules:
    """The rules of a run at work on its weights.

    Args:
        original: the unedited weights, in the model's own orientation.
    """

    def __init__(self, rules: RuleSet, weights: EditedWeights, original: Mapping[str, Tensor]) -> None:
        self.rules, self.weights, self.original = rules, weights, original
        self._ready: dict[str, RuleSet] = {}

    def of(self, name: str) -> RuleSet:
        """The rules, ready for one weight: what they need of the unedited weight is found once."""
        if name not in self._ready:
            original = self.weights.canonical(name, self.original[name]).to(self.weights.get(name))
            self._ready[name] = self.rules.for_weight(name, original)
        return self._ready[name]

    def continue_conditioned(self) -> None:
        """Between two batches: put the conditioned weights in place, where later batches are solved on them."""
        if self.rules.total and self.rules.continue_conditioned:
            self.weights.restore(self.conditioned()[0])

    def conditioned(self) -> tuple[dict[str, Tensor], dict[str, Metrics]]:
        """W_0 + conditioned (W - W_0), in the model's own orientation, and the rules' metrics by weight."""
        result, noted = {}, {}
        for name in self.weights.names:
            now = self.weights.get(name)
            original = self.weights.canonical(name, self.original[name]).to(now)
            applied = apply_rules(self.of(name).total, now - original, original)
            noted[name] = applied.metrics
            result[name] = self.weights.canonical(name, original + applied.delta).contiguous()  # turned back
        return result, noted

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Within it the weights are as they are saved and scored: conditioned where the rules say so."""
        if not self.rules.total:
            yield
            return
        with self.weights.temporarily():
            self.weights.restore(self.conditioned()[0])
            yield

    def final_weights(self) -> dict[str, Tensor]:
        """What is saved and scored: the edited weights, conditioned where the rules say so (`Editor.final_weights`)."""
        with self.as_saved():
            return self.weights.stored()
