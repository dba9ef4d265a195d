"""What a model says to a prompt: its continuation, its likeliest next tokens, and the probability of given targets.

Asked of one model in several states of its weights, the answers show what an edit changed. Knows models, tokenizers and
texts. Knows nothing of runs, methods or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.generate import generate
from sphere.forward.packing import Scored
from sphere.forward.padding import group_by_length
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer
from sphere.requests import check_text
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.lengths import longest_sequence
from sphere.values.tokenization import encode, encode_pair, padding_id
from sphere.weights import EditedWeights

UNEDITED, EDITED = "unedited", "edited"  # labels of the two states of an edited model


@dataclass(frozen=True)
class Question:
    """A prompt, and the targets whose probability behind it is asked for."""

    prompt: str
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """How a model is asked.

    Attributes:
        n_tokens: length of a continuation, unless a token that ends texts comes first.
        n_next: how many of the likeliest next tokens are named.
        temperature: 0 takes the likeliest token at each step; above it tokens are drawn.
        seed: of the draws, the same in every state.
    """

    n_tokens: int = 20
    n_next: int = 5
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or self.n_next < 1:
            name = "n_tokens" if self.n_tokens < 1 else "n_next"
            raise SphereError(f"{name} must be at least 1, got {getattr(self, name)}.", argument=name)
        if not 0 <= self.temperature < math.inf:
            raise SphereError(
                f"temperature is 0, for the likeliest tokens, or above, got {self.temperature}.",
                argument="temperature",
            )


@dataclass(frozen=True)
class Answer:
    """What one state of a model says to one prompt.

    Attributes:
        text: the continuation, without special tokens.
        next_tokens: (token as text, its probability), the likeliest first.
        targets: target -> probability of all of its tokens behind the prompt, the product over them.
    """

    text: str
    next_tokens: tuple[tuple[str, float], ...]
    targets: dict[str, float]


@dataclass(frozen=True)
class Asked:
    """A prompt, and what each state (by its label) says to it."""

    prompt: str
    answers: dict[str, Answer]


def questions_of(prompts: str | Sequence[str | Question], targets: Sequence[str] = ()) -> list[Question]:
    """Questions of prompts, each with these targets beside its own.

    Raises:
        SphereError: no prompt, or a blank prompt or target.
    """
    several = [prompts] if isinstance(prompts, str) else prompts
    questions = [one if isinstance(one, Question) else Question(one) for one in several]
    if not questions:
        raise SphereError("There is nothing to ask: give at least one prompt.", argument="prompts")
    for number, question in enumerate(questions, 1):
        check_text(question.prompt, f"Prompt {number}")
        for target in (*question.targets, *targets):
            check_text(target, f"A target of prompt {number}")
    return [Question(one.prompt, tuple(dict.fromkeys((*one.targets, *targets)))) for one in questions]


def ask_states(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    weights: EditedWeights,
    states: Mapping[str, Mapping[str, Tensor]],
    questions: Sequence[Question],
    options: AskOptions | None = None,
    user_turn: str = BARE,
    passes: PassOptions | None = None,
) -> list[Asked]:
    """Ask a model in several states; its weights are put back at the end.

    Args:
        weights: those of the model that differ between the states.
        states: label -> snapshot of the weights, in the model's own orientation.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).

    Raises:
        SphereError: a prompt that is longer than the model's positions, or weights of another model.
    """
    found: dict[str, list[Answer]] = {}
    with weights.temporarily():
        for label, state in states.items():
            weights.restore(state)
            found[label] = answers(model, tokenizer, questions, options, user_turn, passes)
    return side_by_side(questions, found)


def side_by_side(questions: Sequence[Question], found: Mapping[str, Sequence[Answer]]) -> list[Asked]:
    """The answers of several states, by prompt."""
    return [
        Asked(question.prompt, {label: said[place] for label, said in found.items()})
        for place, question in enumerate(questions)
    ]


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    options: AskOptions | None = None,
    user_turn: str = BARE,
    passes: PassOptions | None = None,
) -> list[Answer]:
    """What the model as it stands says to each question; see `ask_states`."""
    options, passes = options or AskOptions(), passes or PassOptions()
    rows = [encode(tokenizer, in_turn(user_turn, question.prompt)).ids for question in questions]
    _check_positions(model, questions, rows)
    said: dict[int, tuple[str, tuple[tuple[str, float], ...]]] = {}
    for group in group_by_length([len(row) for row in rows], passes.decoding_tokens):
        said |= zip(group, _continue(model, tokenizer, [rows[i] for i in group], options), strict=True)
    asked = [(in_turn(user_turn, q.prompt), target) for q in questions for target in q.targets]
    probabilities = _probabilities(model, tokenizer, asked, passes)
    return [
        Answer(*said[i], {t: probabilities[in_turn(user_turn, q.prompt), t] for t in q.targets})
        for i, q in enumerate(questions)
    ]


def _check_positions(model: Any, questions: Sequence[Question], rows: Sequence[Sequence[int]]) -> None:
    """A prompt must leave room for at least one token."""
    positions = longest_sequence(model)
    for number, (question, row) in enumerate(zip(questions, rows, strict=True), 1):
        if positions is not None and len(row) >= positions:
            raise SphereError(
                f"Prompt {number}, {question.prompt[:40]!r}..., has {len(row)} tokens, which leaves none of the "
                f"model's {positions} positions for an answer: shorten it."
            )


def _continue(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], options: AskOptions
) -> list[tuple[str, tuple[tuple[str, float], ...]]]:
    """(continuation, likeliest next tokens with their probabilities) of each row of token ids."""
    width, positions = max(map(len, rows)), longest_sequence(model)
    room = options.n_tokens if positions is None else min(options.n_tokens, positions - width)
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0} if options.temperature else {}
    config = GenerationConfig(
        max_new_tokens=room,
        **drawn,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=_stops(model, tokenizer) or None,
    )
    first = _FirstLogits(options.n_next)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # an editor's own draws go on as if nobody had asked
        torch.manual_seed(options.seed)
        ids = generate(model, rows, config, first)  # rows x (width + new)
    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    likely = [
        tuple((str(tokenizer.decode([token])), p) for token, p in zip(*row, strict=True))
        for row in zip(first.tokens, first.probabilities, strict=True)
    ]
    return list(zip(texts, likely, strict=True))


class _FirstLogits(LogitsProcessor):
    """Notes the likeliest tokens of the first step, and changes nothing."""

    def __init__(self, n_next: int) -> None:
        self.n_next = n_next
        self.tokens: list[list[int]] = []
        self.probabilities: list[list[float]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.tokens:
            likely = scores.float().softmax(-1).topk(min(self.n_next, scores.shape[-1]))
            self.tokens, self.probabilities = likely.indices.tolist(), likely.values.tolist()
        return scores


def _stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's own settings name (an end of a turn)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *named) if token is not None})


def _probabilities(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    passes: PassOptions,
) -> dict[tuple[str, str], float]:
    """Probability of each target behind its prompt, as it is given to the model."""
    encoded = {}
    for prompt, target in pairs:
        ids, start = encode_pair(tokenizer, prompt, target)
        encoded[prompt, target] = Scored(tuple(ids), start)
    scores = PackedScorer(model, passes).score(list(encoded.values()))
    return {pair: math.exp(-float(scores[scored].nll.sum())) for pair, scored in encoded.items()}
