"""Teacher-forced metrics of edited facts: CounterFact and zsRE, batched over records.

CounterFact (Meng et al. 2022, arXiv 2202.05262): for each prompt the mean negative log-likelihood per token of the
new and of the true target. Rewrite and paraphrase prompts succeed where the new target is the more likely one,
neighborhood prompts where the true one is; accuracy asks whether every token of that target is the argmax.

zsRE (Levy et al. 2017, as MEND uses it): the share of the answer's tokens that are the argmax, given those before.

Knows what is asked of a model about a record. Knows nothing of checkpoints, averages or files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.data.formats import Question
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation.answer_metrics import compare_answers
from sphere.evaluation.probes import compare_probes, probe_entries, scored_questions
from sphere.forward.packing import Scored, TokenScores
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.joiner import Continued
from sphere.values.tokenization import encode_pair

log = logging.getLogger(__name__)

Case = dict[str, Any]
SECTIONS = ("rewrite", "paraphrase", "neighborhood")


class RecordScorer:
    """Scores records under one model, whose weights may change between calls; tokenises each prompt once.

    Args:
        passes: how forward passes are cut.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        passes: PassOptions | None = None,
        user_turn: str = BARE,
    ) -> None:
        self.tokenizer, self.user_turn = tokenizer, user_turn
        self.scorer = PackedScorer(model, passes)
        self._encoded: dict[Continued, Scored] = {}

    def score(self, records: Sequence[Record], progress: bool | tqdm = True) -> list[Case]:
        """One JSON-able dict per record, in order; see `score_records`."""
        questions = [_questions(record) for record in records]
        wanted = {
            self._encode(Continued(prompt, target, record.request.joiner))
            for record, asked in zip(records, questions, strict=True)
            for _, prompt, targets in asked
            for target in targets
        } | {
            self._encode(Continued(question.prompt, question.answers[0], record.request.joiner))
            for record in records
            for question in scored_questions(record)
        }
        if isinstance(progress, tqdm):
            scores = self.scorer.score(list(wanted))
            progress.update(len(records))
        else:
            with tqdm(total=len(wanted), desc="scoring", unit="seq", disable=not progress) as bar:
                scores = self.scorer.score(list(wanted), bar)
        return [self._case(r, asked, scores) for r, asked in zip(records, questions, strict=True)]

    def _encode(self, pair: Continued) -> Scored:
        if pair not in self._encoded:
            asked = pair._replace(prompt=in_turn(self.user_turn, pair.prompt))
            ids, start = encode_pair(self.tokenizer, *asked)
            self._encoded[pair] = Scored(tuple(ids), start)
        return self._encoded[pair]

    def _case(
        self,
        record: Record,
        questions: list[tuple[str, str, tuple[str, ...]]],
        scores: Mapping[Scored, TokenScores],
    ) -> Case:
        request = record.request
        case: Case = {
            "case_id": record.case_id,
            "kind": record.kind,
            "subject": request.subject,
            "target_new": request.target_new,
            "target_true": request.target_true,
            **{section: [] for section in SECTIONS},
        }
        for section, prompt, targets in questions:
            sequences = [self._encode(Continued(prompt, target, request.joiner)) for target in targets]
            judge = _compare_targets if record.kind == "counterfact" else _answer_tokens
            result = judge(section, sequences, [scores[s] for s in sequences])
            if record.kind == "zsre":
                result = {"target": targets[0], **result}
            elif section == "neighborhood" and targets[1] != request.target_true:
                result = {"target_true": targets[1], **result}
            case[section].append({"prompt": prompt, **result})
        if record.probes:
            case["probes"] = probe_entries(record, lambda question: self._accuracy(question, record, scores))
        return case

    def _accuracy(self, question: Question, record: Record, scores: Mapping[Scored, TokenScores]) -> float:
        sequence = self._encode(Continued(question.prompt, question.answers[0], record.request.joiner))
        hits = scores[sequence].hits(sequence)
        return sum(hits) / len(hits)


def score_records(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    passes: PassOptions | None = None,
    user_turn: str = BARE,
    progress: bool = True,
    reference: Sequence[Case] | None = None,
) -> list[Case]:
    """Score records under the model as it stands.

    Args:
        passes: how forward passes are cut.
        user_turn: what prompts are put into; see `RecordScorer`.
        reference: cases of the unedited model, against whose predictions zsRE's neighbors are measured too.

    Returns:
        One JSON-able dict per record: case_id, kind, subject, target_new, target_true, and for each of rewrite,
        paraphrase and neighborhood a list with one entry per prompt:
        CounterFact: prompt, nll_new, nll_true (nats per token), success, accuracy (0/1), prob_diff (of the target
        that should win minus the other, each exp(-nll)). Logits that are not finite succeed nowhere.
        zsRE: prompt, target, accuracy (share of tokens), predicted (argmax ids); neighbors have
        accuracy_given_answer and accuracy_unedited_prediction (None without `reference`) instead of accuracy.
        Where the record has probes, those too: see `sphere.evaluation.probes.probe_entries`.

    Raises:
        SphereError: a record that cannot be scored.
    """
    start = time.perf_counter()
    cases = RecordScorer(model, tokenizer, passes, user_turn).score(records, progress)
    seconds = time.perf_counter() - start
    prompts = count_prompts(cases)
    log.info("scored %d prompts in %.1f s: %.1f prompts/s", prompts, seconds, prompts / max(seconds, 1e-9))
    if reference is not None:
        compare_predictions(cases, reference)
    return cases


def count_prompts(cases: Iterable[Case]) -> int:
    """How many prompts the cases hold (CounterFact scores two targets for each)."""
    cases = list(cases)
    own = sum(len(case[section]) for case in cases for section in SECTIONS)
    probes = (probe for case in cases for probe in case.get("probes", ()))
    return own + sum(len(probe["questions"]) + len(probe["conditions"]) for probe in probes)


def compare_predictions(cases: Sequence[Case], reference: Sequence[Case]) -> None:
    """Fill in what is measured against the unedited model.

    Which probes count, answers that should stay as they were, and the share of the predicted tokens of zsRE's neighbors
    that it predicts too.

    Raises:
        SphereError: the reference lacks a case.
    """
    unedited = {case["case_id"]: case for case in reference}
    for case in cases:
        if case["kind"] != "zsre" and not case.get("probes"):
            continue  # nothing is
        if case["case_id"] not in unedited:
            raise SphereError(
                f"Case {case['case_id']} has no scores of the unedited model: score edit_0 on it."
            )
        compare_probes(case, unedited[case["case_id"]])
        compare_answers(case, unedited[case["case_id"]])
        if case["kind"] != "zsre":
            continue
        for entry, before in zip(
            case["neighborhood"], unedited[case["case_id"]]["neighborhood"], strict=True
        ):
            same = [a == b for a, b in zip(entry["predicted"], before["predicted"], strict=True)]
            entry["accuracy_unedited_prediction"] = sum(same) / len(same)


def _questions(record: Record) -> list[tuple[str, str, tuple[str, ...]]]:
    """(section, prompt, targets to score after it) of a record."""
    request = record.request
    if record.kind == "zsre":
        own: tuple[str, ...] = (request.target_new,)
        neighbors: list[tuple[str, tuple[str, ...]]] = [
            (p, (answer or "",)) for p, answer in record.neighborhood
        ]
    else:
        if request.target_true is None:
            raise SphereError(f"Case {record.case_id} has no true target: CounterFact's scores need one.")
        own = (request.target_new, request.target_true)
        neighbors = [
            (prompt, (request.target_new, answer or request.target_true))
            for prompt, answer in record.neighborhood
        ]
    questions = [("rewrite", request.text, own)]
    questions += [("paraphrase", prompt, own) for prompt in record.paraphrase_prompts]
    return questions + [("neighborhood", prompt, targets) for prompt, targets in neighbors]


def _compare_targets(
    section: str, sequences: Sequence[Scored], scores: Sequence[TokenScores]
) -> dict[str, Any]:
    """CounterFact: new against true target; the neighborhood should keep the true one."""
    new, true = (float(score.nll.mean()) for score in scores)
    keeps = section == "neighborhood"
    wanted = 1 if keeps else 0
    difference = math.exp(-new) - math.exp(-true)
    return {
        "nll_new": _finite(new),
        "nll_true": _finite(true),
        "success": true < new if keeps else new < true,
        "accuracy": all(scores[wanted].hits(sequences[wanted])),
        "prob_diff": _finite(-difference if keeps else difference),
    }


def _finite(value: float) -> float | None:
    """JSON knows no NaN: a number that a destroyed model could not give is null."""
    return value if math.isfinite(value) else None


def _answer_tokens(
    section: str, sequences: Sequence[Scored], scores: Sequence[TokenScores]
) -> dict[str, Any]:
    """zsRE: the share of the answer's tokens that are the argmax."""
    hits = scores[0].hits(sequences[0])
    share, predicted = sum(hits) / len(hits), scores[0].predicted.tolist()
    if section != "neighborhood":
        return {"accuracy": share, "predicted": predicted}
    return {"accuracy_given_answer": share, "accuracy_unedited_prediction": None, "predicted": predicted}
