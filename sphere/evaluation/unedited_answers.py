"""What facts leave open, asked of the unedited model: which answer an edit replaces, and what neighbors answer.

A fact without a true target is measured against the model's own answer before the edit: what it says greedily after the
prompt, as many tokens as the new target has. Where it says the new target already, or nothing, the likeliest answer
with another first token stands in. A neighbor without an answer keeps what the model said of it. A fact without
neighbors gets control prompts, questions of common knowledge that ship with the project.

Knows models and records. Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.forward.generate import generate
from sphere.forward.padding import group_by_length
from sphere.forward.passes import PassOptions
from sphere.requests import EditRequest
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.lengths import CaseText, check_lengths
from sphere.values.tokenization import encode, encode_pair, padding_id

N_TOKENS = 5  # of a neighbor's answer
TRIES = 8  # first tokens that are tried one after the other where an answer will not do
N_CONTROLS = 3  # control prompts of a fact without neighbors
Question = tuple[str, int, str]  # prompt, number of tokens, the answer that it must not be ("": any)


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    controls: Sequence[tuple[str, str]],
    passes: PassOptions | None = None,
    user_turn: str = BARE,
) -> tuple[list[Record], dict[str, str]]:
    """Records that can be scored as CounterFact's: each with a true target, and neighbors with answers.

    Args:
        model: the unedited one.
        controls: (prompt, answer) of which facts without neighbors get some, chosen by their case_id.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).

    Returns:
        the records, and sentences for a summary on what was filled in, by what they speak of.

    Raises:
        SphereError: a prompt after which the model says nothing, or that is longer than its positions.
    """
    texts = (
        CaseText(record.case_id, "prompt that the unedited model is asked", in_turn(user_turn, prompt))
        for record in records
        for prompt in (record.request.text, *(prompt for prompt, _ in record.neighborhood))
    )
    check_lengths(model, tokenizer, texts)
    with_neighbors = [
        record
        if record.neighborhood
        else dataclasses.replace(record, neighborhood=_controls(record.case_id, controls))
        for record in records
    ]
    asked = {question for record in with_neighbors for question in _questions(record, tokenizer, user_turn)}
    answers = _answers(model, tokenizer, sorted(asked), passes or PassOptions(), user_turn)
    return [_filled(record, tokenizer, user_turn, answers) for record in with_neighbors], _notes(records)


def _notes(records: Sequence[Record]) -> dict[str, str]:
    """What was filled in, in words."""
    unknown = sum(record.request.target_true is None for record in records)
    alone = sum(not record.neighborhood for record in records)
    unanswered = sum(answer is None for record in records for _, answer in record.neighborhood)
    notes = {}
    if unknown:
        notes["target_true"] = (
            f"{unknown} of {len(records)} facts name no true target: their success is against the unedited model's own "
            "answer."
        )
    if alone:
        notes["neighborhood"] = (
            f"{alone} of {len(records)} facts have no neighborhood: theirs are control prompts that ship with the "
            "project."
        )
    if unanswered:
        notes["neighborhood_answers"] = (
            f"{unanswered} neighborhood prompts have no answer: the unedited model's own is to be kept."
        )
    return notes


def _controls(case_id: int, controls: Sequence[tuple[str, str]]) -> tuple[tuple[str, str | None], ...]:
    first = case_id * N_CONTROLS
    return tuple(controls[(first + i) % len(controls)] for i in range(min(N_CONTROLS, len(controls))))


def _about_itself(request: EditRequest, tokenizer: PreTrainedTokenizerBase, user_turn: str) -> Question:
    """What the model is asked for an edit's true target: as many tokens as the new one has behind the prompt."""
    prompt = in_turn(user_turn, request.text)
    ids, start = encode_pair(tokenizer, prompt, request.target_new, request.joiner)
    return request.text, len(ids) - start, request.target_new


def _questions(record: Record, tokenizer: PreTrainedTokenizerBase, user_turn: str) -> list[Question]:
    """What must be asked of the model about a record."""
    request = record.request
    questions: list[Question] = [(p, N_TOKENS, "") for p, answer in record.neighborhood if answer is None]
    if request.target_true is None:
        questions.append(_about_itself(request, tokenizer, user_turn))
    return questions


def _filled(
    record: Record, tokenizer: PreTrainedTokenizerBase, user_turn: str, answers: Mapping[Question, str]
) -> Record:
    request = record.request
    if request.target_true is None:
        own = answers[_about_itself(request, tokenizer, user_turn)]
        request = dataclasses.replace(request, target_true=own)
    neighborhood = tuple(
        (prompt, answers[prompt, N_TOKENS, ""] if answer is None else answer)
        for prompt, answer in record.neighborhood
    )
    return dataclasses.replace(record, request=request, neighborhood=neighborhood)


def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    passes: PassOptions,
    user_turn: str,
) -> dict[Question, str]:
    """The greedy answer to each question that is neither blank nor what it must not be."""
    found: dict[Question, str] = {}
    for length in sorted({n for _, n, _ in questions}):
        todo = [question for question in questions if question[1] == length]
        rows = [encode(tokenizer, in_turn(user_turn, prompt)).ids for prompt, _, _ in todo]
        for group in group_by_length([len(row) for row in rows], passes.decoding_tokens):
            left = list(group)
            tried: dict[int, set[int]] = {i: set() for i in group}
            for _ in range(TRIES):
                said = _say(model, tokenizer, [rows[i] for i in left], [tried[i] for i in left], length)
                for i, (first, text) in zip(list(left), said, strict=True):
                    tried[i].add(first)
                    if text and not _same(text, todo[i][2]):
                        found[todo[i]] = text
                        left.remove(i)
                if not left:
                    break
            if left:
                raise SphereError(
                    f"The unedited model has no answer to {todo[left[0]][0]!r} but blanks: give the fact a "
                    "target_true, and its neighbors answers."
                )
    return found


def _say(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    avoided: Sequence[set[int]],
    length: int,
) -> list[tuple[int, str]]:
    """(first token, text up to the end of its line) of the greedy continuation of each row.

    Args:
        avoided: first tokens that each row's continuation must not begin with.
    """
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    width = max(map(len, rows))
    ids = generate(model, rows, config, _Avoid(width, avoided))  # rows x (width + new)
    new = ids[:, width:]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        (int(row[0]), text.lstrip("\n").partition("\n")[0].strip())
        for row, text in zip(new, texts, strict=True)
    ]


class _Avoid(LogitsProcessor):
    """Keeps the first new token of each row from being one of those that are avoided."""

    def __init__(self, width: int, avoided: Sequence[set[int]]) -> None:
        self.width, self.avoided = width, avoided

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] == self.width:
            for row, tokens in enumerate(self.avoided):
                scores[row, list(tokens)] = -torch.inf
        return scores


def _same(answer: str, other: str) -> bool:
    return answer.split() == other.split()
