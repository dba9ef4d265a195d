"""A cheap look at what sequential edits must not break, after each batch.

    text_perplexity      of the beginning of the fixed text (`sphere.evaluation.perplexity`)
    control_nll          mean negative log-likelihood of the answers to some control prompts, nats per token
    control_correct      fraction of them whose tokens are all the most likely ones
    edits_hold           of a sample of the edits so far, the last batch's included: the fraction that hold
    energy_change        largest relative change of an edited weight's hyperspherical energy, without its sign
    condition_growth     largest factor by which an edited weight's condition number grew

About 700 tokens, once through the model. Knows models, records and matrices. Knows nothing of limits, runs or files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.data.controls import control_prompts
from sphere.data.records import Record
from sphere.evaluation.perplexity import TEXT_NAME, read_paragraphs, text_perplexity
from sphere.evaluation.scoring import RecordScorer
from sphere.forward.packing import Scored
from sphere.forward.passes import PassOptions
from sphere.hypersphere import condition_number, hyperspherical_energy
from sphere.resources import shipped
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.tokenization import encode_pair

PARAGRAPHS = 2  # of the fixed text
CONTROLS = 16  # control prompts, evenly spread over the project's
EDITS = 32  # that are asked again: fewer would tell a fraction that falls from one that varies too late

T = TypeVar("T")
Watched = dict[
    str, float | None
]  # infinite where a broken model gives no number; None: there is nothing to measure


class ModelWatch:
    """Measures a model under edit; what is asked of the unedited weights is found once.

    Args:
        model: any causal language model of transformers, in evaluation mode; its weights may change between calls.
        original: name -> unedited weight (out x in).
        passes: how forward passes are cut.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        original: Mapping[str, Tensor],
        passes: PassOptions | None = None,
        user_turn: str = BARE,
    ) -> None:
        self._records = RecordScorer(model, tokenizer, passes, user_turn)
        self._tokenizer = tokenizer
        self._paragraphs = read_paragraphs(shipped("data") / TEXT_NAME)[:PARAGRAPHS]
        self._controls = [
            Scored(tuple(ids), start)
            for prompt, answer in spread(control_prompts(), CONTROLS)
            for ids, start in [encode_pair(tokenizer, in_turn(user_turn, prompt), answer)]
        ]
        self._energies = {name: hyperspherical_energy(weight) for name, weight in original.items()}
        self._conditions = {name: condition_number(weight) for name, weight in original.items()}

    def text_and_controls(self) -> dict[str, float]:
        """What no edit is about: text_perplexity, control_nll and control_correct of the model as it stands."""
        scorer = self._records.scorer
        perplexity = text_perplexity(
            scorer, self._tokenizer, self._paragraphs
        )  # the longest first: one probe
        scores = scorer.score(self._controls)
        nll = fmean(float(scores[control].nll.mean()) for control in self._controls)
        correct = fmean(all(scores[control].hits(control)) for control in self._controls)
        return {
            "text_perplexity": math.inf if perplexity is None else perplexity,
            "control_nll": nll if math.isfinite(nll) else math.inf,
            "control_correct": correct,
        }

    def edits_hold(self, records: Sequence[Record]) -> float:
        """The fraction of a sample of these records whose edit holds at its rewrite prompt.

        CounterFact: the new target is likelier than the true one. zsRE: the fraction of its tokens that are the argmax.
        """
        bare = [
            dataclasses.replace(record, paraphrase_prompts=(), neighborhood=())
            for record in spread(records, EDITS)
        ]
        cases = self._records.score(bare, progress=False)
        entries = [(case["kind"], case["rewrite"][0]) for case in cases]
        return fmean(entry["success" if kind == "counterfact" else "accuracy"] for kind, entry in entries)

    def weights(
        self, weights: Mapping[str, Tensor], known: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Watched:
        """energy_change and condition_growth of edited weights (out x in).

        Args:
            known: name -> metrics; `energy_change` and `condition` of `sphere.runs.monitor` are taken where they are.
        """
        metrics = known or {}
        changes = [
            self._energy_change(name, weight, metrics.get(name, {})) for name, weight in weights.items()
        ]
        growth = [self._growth(name, weight, metrics.get(name, {})) for name, weight in weights.items()]
        return {"energy_change": _largest(changes), "condition_growth": _largest(growth)}

    def _energy_change(self, name: str, weight: Tensor, known: Mapping[str, Any]) -> float | None:
        if (change := known.get("energy_change")) is not None:
            return abs(change)
        before = self._energies[name]
        return abs(hyperspherical_energy(weight) - before) / abs(before) if before else None

    def _growth(self, name: str, weight: Tensor, known: Mapping[str, Any]) -> float | None:
        before, now = self._conditions[name], known.get("condition")
        return (condition_number(weight) if now is None else now) / before if math.isfinite(before) else None


def spread(items: Sequence[T], size: int) -> list[T]:
    """At most `size` of them, evenly spread from the first to the last."""
    if len(items) <= size:
        return list(items)
    return [items[place] for place in torch.linspace(0, len(items) - 1, size).round().long().tolist()]


def _largest(values: Sequence[float | None]) -> float | None:
    """None where there are none."""
    return max((value for value in values if value is not None), default=None)
