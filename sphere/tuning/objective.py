"""What a trial is worth: edit the tuning set, score it, and look whether the model still speaks.

Knows the editor, the scores of edits and the perplexity of the fixed text. Knows nothing of how trials are chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.data.records import Record
from sphere.distributed import Processes
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.evaluation.perplexity import TEXT_NAME, read_paragraphs, text_perplexity
from sphere.evaluation.scoring import Case, RecordScorer
from sphere.evaluation.summary import SCORES, summarise
from sphere.hparams import HParams
from sphere.runs.config import RunConfig
from sphere.runs.lengths import check_records
from sphere.runs.run import editor_of

log = logging.getLogger(__name__)

PARTS = ("efficacy", "paraphrase", "neighborhood")


@dataclass(frozen=True)
class Outcome:
    """What a trial has come to after some batches.

    Attributes:
        n_edits: facts edited and scored.
        value: the objective: the score, reduced where the perplexity rose too far; 0 where editing failed.
        score: harmonic mean of the three parts, in percent.
        parts: efficacy, paraphrase and neighborhood, in percent.
        perplexity: of the fixed text, relative to the unedited model's; None where it is not finite.
        seconds: since the trial began.
        error: why editing failed.
    """

    n_edits: int
    value: float
    score: float = 0.0
    parts: dict[str, float] | None = None
    perplexity: float | None = None
    seconds: float = 0.0
    error: str | None = None


def objective(score: float, perplexity: float | None, limit: float) -> float:
    """The score, times limit / perplexity where that is below 1; 0 for a model whose perplexity is not finite."""
    return 0.0 if perplexity is None else score * min(1.0, limit / perplexity)


class Objective:
    """Edits the tuning set with given hyperparameters; the model is as it was after each trial.

    What no number that is searched changes is found once: context templates, second moments, tokens of the prompts.

    Attributes:
        coordinate: mean absolute coordinate of h0, the unedited hidden states at the z layer's lookup positions.

    Args:
        config: the kind of run that is tuned for (method, rules, batch size, passes, ...).
        start: hyperparameters with the layers to edit.
        records: the tuning set, in the order of editing.
        max_perplexity: see `objective`.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        start: HParams,
        records: Sequence[Record],
        max_perplexity: float,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.records, self.max_perplexity = list(records), max_perplexity
        editor = self._editor(start, None)
        check_records(editor, self.records)
        self.templates = editor.services.context_templates
        self.second_moments = editor.services.second_moments
        h0 = editor.services.bare_pass([record.request for record in self.records]).outputs(max(start.layers))
        self.coordinate = float(h0.abs().mean())  # h0: out x n
        editor.close()
        self.scorer = RecordScorer(model, tokenizer, config.passes, editor.edited.user_turn)
        self.paragraphs = read_paragraphs(f"data/{TEXT_NAME}")
        self.unedited_perplexity = self._perplexity()

    def evaluate(self, hparams: HParams, go_on: Callable[[Outcome], bool]) -> Outcome:
        """Edit batch after batch, score all facts edited so far after each.

        Args:
            go_on: asked after each batch but the last whether the next one is worth its time.
        """
        start, done = time.perf_counter(), 0
        editor = self._editor(hparams, self.templates)
        editor.services.second_moments = self.second_moments
        try:
            while True:
                batch = self.records[done : done + self.config.num_edits]
                editor.edit([record.request for record in batch])
                done += len(batch)
                outcome = self._outcome(editor, done, start)
                if done == len(self.records) or not go_on(outcome):
                    return outcome
        except SphereError as error:
            log.info("The trial failed: %s", error)
            return Outcome(done, 0.0, seconds=time.perf_counter() - start, error=str(error))
        finally:
            editor.revert()
            editor.close()

    def _outcome(self, editor: Editor, done: int, start: float) -> Outcome:
        final = editor.final_weights()
        with editor.weights.temporarily(self.config.passes.offload_device):
            editor.weights.restore(final)
            cases = self.scorer.score(self.records[:done], progress=False)
            perplexity = self._perplexity()
        ratio = None if perplexity is None else perplexity / (self.unedited_perplexity or perplexity)
        score, parts = mean_score(cases)
        value = objective(score, ratio, self.max_perplexity)
        return Outcome(done, value, score, parts, ratio, time.perf_counter() - start)

    def _perplexity(self) -> float | None:
        return text_perplexity(self.scorer.scorer, self.tokenizer, self.paragraphs)

    def _editor(self, hparams: HParams, templates: Sequence[Sequence[str]] | None) -> Editor:
        return editor_of(self.config, self.model, self.tokenizer, hparams, templates, Processes())


def mean_score(cases: Sequence[Case]) -> tuple[float, dict[str, float]]:
    """The score of a table (`sphere.evaluation.summary`) and its three parts, in percent.

    Raises:
        SphereError: no case has all three kinds of prompts.
    """
    summary: dict[str, Any] = summarise(cases)
    names = SCORES[summary["kind"]]["score"]
    if summary["score"] is None:
        raise SphereError(
            "The tuning set needs facts with paraphrase and neighborhood prompts: use another dataset."
        )
    parts = {part: summary[name]["mean"] for part, name in zip(PARTS, names, strict=True)}
    return summary["score"]["value"], parts
