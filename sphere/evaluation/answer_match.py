"""Is a text the answer? Exact match, containment and token F1, as SQuAD compares texts (Rajpurkar et al. 2016).

Knows texts only.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence


def normalise_answer(text: str) -> str:
    """Lower case without punctuation, articles and extra space (SQuAD, Rajpurkar et al. 2016)."""
    return " ".join(word for word in _words(text).split() if word not in ("a", "an", "the"))


def soft_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the words of any answer occur, together and in order, in the prediction; both normalised."""
    pairs = [_normalised(prediction, answer) for answer in answers]
    return any(f" {answer} " in f" {found} " if answer else not found for found, answer in pairs)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals any answer; both normalised."""
    return any(found == wanted for found, wanted in (_normalised(prediction, a) for a in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over the answers of the words shared with the prediction (SQuAD); both normalised."""
    return max((_token_f1(*_normalised(prediction, answer)) for answer in answers), default=0.0)


def _normalised(prediction: str, answer: str) -> tuple[str, str]:
    """Both texts as they are compared: articles, then punctuation are kept where nothing else is left of the answer.

    So the label "A" of a choice is not taken for an article.
    """
    forms = (normalise_answer, _words, _as_written)
    form = next((form for form in forms if form(answer)), _as_written)
    return form(prediction), form(answer)


def _words(text: str) -> str:
    return _as_written("".join(c for c in text if c not in string.punctuation))


def _as_written(text: str) -> str:
    return " ".join(text.lower().split())


def _token_f1(prediction: str, answer: str) -> float:
    found, wanted = prediction.split(), answer.split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))
