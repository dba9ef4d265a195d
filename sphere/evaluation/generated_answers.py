"""What an edited model says when it is asked: greedy text to a stop, and whether it is the answer.

Teacher-forced metrics show the model an answer's first tokens and ask for the next; a user shows it the prompt alone.
Here rewrite and paraphrase prompts and all questions of a benchmark's further tests are continued until the model ends
its text, a line or a sentence, or after `MAX_TOKENS` tokens. The text is compared with the answer, and with its other
names where it has some, after SQuAD's normalisation: exact match, containment and token F1. A question without an
answer is to be answered as the unedited model answers it. A program of the user's may judge the answers too.

Knows models, records and texts. Knows nothing of checkpoints, averages or files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from sphere.data.records import Record
from sphere.evaluation.answer_metrics import KEY, AnswerOptions, measured
from sphere.evaluation.judge import Judge
from sphere.forward.generate import generate
from sphere.forward.padding import group_by_length
from sphere.forward.passes import PassOptions
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.lengths import longest_sequence
from sphere.values.tokenization import encode, padding_id

MAX_TOKENS = 32  # of an answer
FORMAT = 1  # of what `GeneratedAnswers.generate` returns; a change has every case generated again
# A sentence ends at a full stop behind a word of three letters or more, so that "St. Petersburg" does not.
END = re.compile(r"\n|[。！？]|(?<=\w{3})[.!?](?=\s)")


class _Asked(NamedTuple):
    """What is asked under which name; probe: its place among the record's."""

    part: str
    probe: int | None
    prompt: str
    targets: tuple[str, ...]


class GeneratedAnswers:
    """Answers of the first so many cases, under one model whose weights may change.

    Args:
        cases: the edited records, in the order of editing.
        passes: how forward passes are cut.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).

    Attributes:
        key: of a case, under which the answers stand.
        notes: in words, which cases are asked.
    """

    key = KEY

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[Record],
        options: AnswerOptions,
        passes: PassOptions | None = None,
        user_turn: str = BARE,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.passes, self.user_turn = passes or PassOptions(), user_turn
        self.judge = Judge(options.judge, options.judge_seconds) if options.judge else None
        self._case_ids = {record.case_id for record in cases[: options.facts]}
        self._ends = _end_tokens(model, tokenizer)
        note = f"the first {len(self._case_ids)} of {len(cases)} cases, greedy, to a stop"
        self.notes = {"generated": note} if options.facts else {}

    def wants(self, record: Record) -> bool:
        """Is this case asked?"""
        return record.case_id in self._case_ids

    def settings(self, record: Record) -> str:
        """A digest that changes with whatever, besides model and tokenizer, the answers depend on."""
        own = [FORMAT, MAX_TOKENS, self._ends, self.user_turn, self.options.judge, *_asked(record)]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def generate(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """JSON-able, one per record: settings (a digest), and entries: part ("rewrite", "paraphrase" or the name of a
        further test), probe (its place among the record's, else None), prompt, targets, text, exact_match and
        containment (0/1), f1 and, where there is a judge, judged (0 to 1). Without targets none of these: see
        `sphere.evaluation.answer_metrics.compare_answers`.

        Raises:
            SphereError: the judge fails.
        """
        asked = [list(_asked(record)) for record in records]
        texts = iter(self._say([one.prompt for own in asked for one in own]))
        return [
            {"settings": self.settings(record), "entries": [self._entry(one, next(texts)) for one in own]}
            for record, own in zip(records, asked, strict=True)
        ]

    def close(self) -> None:
        """End the judge's program."""
        if self.judge:
            self.judge.close()

    def _entry(self, asked: _Asked, text: str) -> dict[str, Any]:
        entry = {**asked._asdict(), "targets": list(asked.targets), "text": text}
        if not asked.targets:
            return entry
        entry |= measured(text, asked.targets)
        if self.judge:
            told = {"prompt": asked.prompt, "answer": text, "targets": list(asked.targets)}
            entry["judged"] = self.judge(told)
        return entry

    def _say(self, prompts: Sequence[str]) -> list[str]:
        """The answer to each prompt."""
        distinct = list(dict.fromkeys(prompts))
        rows = [encode(self.tokenizer, in_turn(self.user_turn, prompt)).ids for prompt in distinct]
        said: dict[str, str] = {}
        for group in group_by_length([len(row) for row in rows], self.passes.decoding_tokens):
            answers = self._greedy([rows[i] for i in group])
            said |= {distinct[i]: answer for i, answer in zip(group, answers, strict=True)}
        return [said[prompt] for prompt in prompts]

    def _greedy(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Each row's continuation to its stop, in one batch with a KV cache."""
        width, positions = max(map(len, rows)), longest_sequence(self.model)
        if positions and width + MAX_TOKENS > positions and len(rows) > 1:  # together they do not fit
            return [self._greedy([row])[0] for row in rows]
        new = min(MAX_TOKENS, positions - width) if positions else MAX_TOKENS
        if new < 1:
            return [""] * len(rows)
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=padding_id(self.tokenizer),
            eos_token_id=self._ends or None,
        )
        stop = _AnswerEnds(self.tokenizer, width)
        ids = generate(self.model, rows, config, stopping=stop)[:, width:].tolist()  # b x new
        kept = [row[: next((i for i, t in enumerate(row) if t in self._ends), len(row))] for row in ids]
        return [answer_in(text) for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]


def answer_in(text: str) -> str:
    """A text up to the end of its first line or sentence."""
    text = text.lstrip()
    end = END.search(text)
    return text[: end.start() if end else len(text)].strip()


class _AnswerEnds(StoppingCriteria):
    """Ends a row once its text holds an answer.

    Args:
        width: tokens of a row before the first new one, padding included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self.tokenizer, self.width = tokenizer, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        ended = [END.search(text.lstrip()) is not None for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's own configuration names."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return sorted({int(token) for token in found if token is not None})


def _asked(record: Record) -> Iterator[_Asked]:
    target = (record.request.target_new.strip(),)
    yield _Asked("rewrite", None, record.request.text, target)
    for prompt in record.paraphrase_prompts:
        yield _Asked("paraphrase", None, prompt, target)
    for place, probe in enumerate(record.probes):
        for question in probe.questions:
            yield _Asked(probe.metric, place, question.prompt, question.answers)
