"""Perplexity of a fixed text: the cheapest sign that a model has lost more than the facts that were edited.

The text is the project's own (`data/fixed_text.txt`: seven plain English paragraphs), so that the number can be had
everywhere; it is comparable between checkpoints of one model, not with published perplexities. Knows token ids and
models; knows nothing of edits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.packing import Scored
from sphere.forward.scorer import PackedScorer
from sphere.resources import find
from sphere.values.lengths import longest_sequence
from sphere.values.tokenization import encode

TEXT_NAME = "fixed_text.txt"


def read_paragraphs(path: str | Path) -> list[str]:
    """The paragraphs of a text file, which blank lines separate.

    Raises:
        SphereError: no such file, or nothing in it.
    """
    try:
        text = find(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SphereError(f"Cannot read the text {path} ({error}): check the path.") from error
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise SphereError(f"The text {path} is empty: give one with at least one paragraph.")
    return paragraphs


def text_perplexity(
    scorer: PackedScorer, tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[str]
) -> float | None:
    """exp of the mean negative log-likelihood (nats) of all tokens but the first of each paragraph.

    A paragraph that is longer than the model's positions is cut there.

    Returns:
        None where it is not finite: a broken model predicts nothing.
    """
    positions = longest_sequence(scorer.model)
    encoded = [tuple(encode(tokenizer, paragraph).ids[:positions]) for paragraph in paragraphs]
    sequences = [Scored(ids, 1) for ids in encoded if len(ids) > 1]
    scores: dict[Scored, Any] = scorer.score(sequences)
    nll = float(np.concatenate([scores[sequence].nll for sequence in sequences]).mean())
    return math.exp(nll) if nll < 700 else None  # NaN compares as false
