"""Greedy text after the rewrite prompts of the first facts: does the model, left to itself, write the new target?

Teacher-forced accuracy is given the target's first tokens when it is asked for the later ones; here the model reads
nothing but the prompt. As many tokens are generated as the target has, and the text must be the target's, white space
aside. Knows models, records and texts. Knows nothing of checkpoints, averages or files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from sphere.data.records import Record
from sphere.forward.generate import generate
from sphere.forward.padding import group_by_length
from sphere.forward.passes import PassOptions
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.joiner import Continued
from sphere.values.lengths import longest_sequence
from sphere.values.tokenization import encode, encode_pair, padding_id

FORMAT = 1  # of what `ExactMatch.generate` returns; a change has every case generated again


class ExactMatch:
    """Greedy text of the first so many cases, under one model whose weights may change.

    Args:
        cases: the edited records, in the order of editing.
        count: how many of them, from the first; 0: none.
        passes: how forward passes are cut.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).

    Attributes:
        key: of a case, under which the text stands.
        notes: in words, which cases have such text.
    """

    key = "greedy"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[Record],
        count: int,
        passes: PassOptions | None = None,
        user_turn: str = BARE,
    ) -> None:
        self.model, self.tokenizer, self.count = model, tokenizer, count
        self.passes, self.user_turn = passes or PassOptions(), user_turn
        self._case_ids = {record.case_id for record in cases[:count]}
        self.notes = (
            {"exact_match": f"the first {len(self._case_ids)} of {len(cases)} cases"} if count else {}
        )

    def wants(self, record: Record) -> bool:
        """Is text generated for this case?"""
        return record.case_id in self._case_ids

    def settings(self, record: Record) -> str:
        """A digest that changes with whatever, besides model and tokenizer, the text depends on."""
        own = [FORMAT, *self._asked(record)]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def generate(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """JSON-able, one per record: settings (a digest), text (what was generated), exact_match."""
        prompts = [encode(self.tokenizer, self._asked(record).prompt).ids for record in records]
        lengths = [self._target_length(record) for record in records]
        texts = [""] * len(records)
        for group in group_by_length([len(ids) for ids in prompts], self.passes.decoding_tokens):
            rows, new = [prompts[i] for i in group], [lengths[i] for i in group]
            for i, text in zip(group, self._greedy(rows, new), strict=True):
                texts[i] = text
        return [
            {
                "settings": self.settings(record),
                "text": text,
                "exact_match": text.split() == record.request.target_new.split(),
            }
            for record, text in zip(records, texts, strict=True)
        ]

    def _asked(self, record: Record) -> Continued:
        request = record.request
        return Continued(in_turn(self.user_turn, request.text), request.target_new, request.joiner)

    def _target_length(self, record: Record) -> int:
        ids, start = encode_pair(self.tokenizer, *self._asked(record))
        return len(ids) - start

    def _greedy(self, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[str]:
        """Each row's continuation by so many tokens, in one batch with a KV cache."""
        width, new, positions = max(map(len, rows)), max(lengths), longest_sequence(self.model)
        if positions and width + new > positions and len(rows) > 1:  # together they do not fit
            return [self._greedy([row], [n])[0] for row, n in zip(rows, lengths, strict=True)]
        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, pad_token_id=padding_id(self.tokenizer)
        )
        ids = generate(self.model, rows, config)[:, width:].tolist()  # b x new
        kept = [row[:n] for row, n in zip(ids, lengths, strict=True)]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=True)
