"""Is a text the answer? Exact match, containment and token F1, as SQuAD compares texts (Rajpurkar et al. 2016).

Knows texts only.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence


def normalise_answer(text: str) -> str:
    """Lower case without punctuation, articles and extra space (SQuAD, Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def soft_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the words of any answer occur, together and in order, in the prediction; both normalised."""
    padded = f" {normalise_answer(prediction)} "
    normalised = [normalise_answer(answer) for answer in answers]
    return any(answer and f" {answer} " in padded for answer in normalised)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals any answer; both normalised."""
    return normalise_answer(prediction) in {normalise_answer(answer) for answer in answers}


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over the answers of the words shared with the prediction (SQuAD); both normalised."""
    return max((_token_f1(normalise_answer(prediction), normalise_answer(a)) for a in answers), default=0.0)


def _token_f1(prediction: str, answer: str) -> float:
    found, wanted = prediction.split(), answer.split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0
