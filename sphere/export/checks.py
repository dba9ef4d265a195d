"""What a model says to a few prompts, and how far two models are apart in it: an export beside the edited model.

Knows models and facts. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import USER_TURN
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation.scoring import RecordScorer
from sphere.evaluation.summary import METRICS
from sphere.export.edited import EditedRun, rewrite_only
from sphere.files import read_json
from sphere.resources import shipped
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.tokenization import encode

N_PROMPTS = 20
N_FACTS = 100  # whose efficacy is measured
CONTROLS = "data/control_prompts.json"
ROUNDINGS = 8  # logits may be off by so many of their largest's, where the weights are equal


@dataclass(frozen=True)
class Said:
    """What a model says.

    Attributes:
        logits: one (tokens x vocabulary) per prompt, float32, on the CPU.
        efficacy: of the edited facts, in percent; None where no facts are known.
    """

    logits: list[Tensor]
    efficacy: float | None = None

    @property
    def largest(self) -> float:
        """The largest absolute logit."""
        return max(float(logits.abs().max()) for logits in self.logits)


@dataclass(frozen=True)
class Comparison:
    """An export, loaded again, beside the edited model.

    Attributes:
        n_prompts: how many were asked; of each, the logits behind every token count.
        difference: the largest absolute difference of a logit.
        largest_logit: of the edited model.
        n_same_token: prompts after which both find the same token the likeliest.
        efficacy_edited, efficacy_exported: of `n_facts` edited facts, in percent; None where there are none.
    """

    n_prompts: int
    difference: float
    largest_logit: float
    n_same_token: int
    n_facts: int
    efficacy_edited: float | None
    efficacy_exported: float | None

    def lines(self) -> list[str]:
        """In words."""
        said = [
            f"Checked on {self.n_prompts} prompts: largest difference of a logit from the edited model's "
            f"{self.difference:.2g} (logits up to {self.largest_logit:.3g}); the same likeliest next token after "
            f"{self.n_same_token} of {self.n_prompts}."
        ]
        if self.efficacy_edited is not None:
            said.append(
                f"Efficacy of {self.n_facts} edited facts: {self.efficacy_edited:.1f} % in the edited model, "
                f"{self.efficacy_exported:.1f} % in the export."
            )
        return said


@dataclass
class Questions:
    """Prompts that models are compared on, and facts whose efficacy is measured.

    Attributes:
        prompts: token ids.
        facts: with their rewrite prompts alone.
        user_turn: what the facts' prompts are put into.
    """

    prompts: list[list[int]]
    facts: list[Record] = field(default_factory=list)
    user_turn: str = BARE

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, facts: bool = True) -> Said:
        """What a model says to them; without `facts` its efficacy is not measured."""
        efficacy = None
        if facts and self.facts:
            efficacy = _efficacy(RecordScorer(model, tokenizer, user_turn=self.user_turn), self.facts)
        return Said([_logits(model, ids) for ids in self.prompts], efficacy)

    def compare(self, edited: Said, exported: Said) -> Comparison:
        """Two models' answers to these questions."""
        pairs = list(zip(edited.logits, exported.logits, strict=True))
        return Comparison(
            n_prompts=len(pairs),
            difference=difference(edited, exported),
            largest_logit=edited.largest,
            n_same_token=sum(int(a[-1].argmax() == b[-1].argmax()) for a, b in pairs),
            n_facts=len(self.facts),
            efficacy_edited=edited.efficacy,
            efficacy_exported=exported.efficacy,
        )


def questions_of(run: EditedRun) -> Questions:
    """The prompts of edited facts, from the first to the last; control prompts where they are not known."""
    turn = str(run.config.get(USER_TURN, BARE))
    records = run.records()
    texts = [in_turn(turn, record.request.text) for record in _spread(records, N_PROMPTS)]
    for entry in read_json(shipped(CONTROLS), "control prompts")[: N_PROMPTS - len(texts)]:
        texts.append(in_turn(turn, entry["prompt"]))
    facts = [rewrite_only(record) for record in _spread(records, N_FACTS)]
    return Questions([encode(run.tokenizer, text).ids for text in texts], facts, turn)


def difference(one: Said, other: Said) -> float:
    """The largest absolute difference of a logit; infinite where one is not finite."""
    found = (float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))
    return max(value if value == value else float("inf") for value in found)


def check_same(written: Said, read: Said, dtype: torch.dtype, what: str) -> None:
    """Refuse an export that does not hold what was written into it.

    Args:
        written: by the model in memory with the weights as they were written.
        read: by the export, loaded again.
        dtype: in which both were computed.

    Raises:
        SphereError: logits differ by more than rounding.
    """
    off = difference(written, read)
    limit = ROUNDINGS * torch.finfo(dtype).eps * max(1.0, written.largest)
    if not off <= limit:
        raise SphereError(
            f"{what}, loaded again, gives logits that are off by {off:.2g} from those of the weights that were "
            f"written, more than rounding ({limit:.2g}): it was not kept; see that the disk and the memory are sound "
            "and that transformers loads the unedited model as it is."
        )


def _spread(records: Sequence[Record], n: int) -> list[Record]:
    """At most `n` of the records, evenly from the first to the last."""
    if len(records) <= n:
        return list(records)
    return [records[round(i * (len(records) - 1) / (n - 1))] for i in range(n)]


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """(tokens x vocabulary) of one prompt, in float32 on the CPU."""
    embeddings: Any = model.get_input_embeddings()
    with torch.inference_mode():
        output: Any = model(input_ids=torch.tensor([ids], device=embeddings.weight.device), use_cache=False)
    return output.logits[0].float().cpu()


def _efficacy(scorer: RecordScorer, facts: Sequence[Record]) -> float:
    """The mean over facts of the first metric of their kind (success, or accuracy), in percent."""
    values = []
    for case in scorer.score(facts, progress=False):
        metric = next(iter(METRICS[case["kind"]].values()))
        values.append(metric(case))
    return fmean(value for value in values if value is not None)
