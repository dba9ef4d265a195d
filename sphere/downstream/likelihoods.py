"""How likely each of a few answers is after a prompt.

Knows models and tokenizers, nothing of tasks or files.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from sphere.downstream.decoding import context_length
from sphere.forward.packing import Scored
from sphere.forward.scorer import PackedScorer
from sphere.values.tokenization import encode_pair


def answer_likelihoods(
    scorer: PackedScorer, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[list[float]]:
    """For each prompt, the mean log-likelihood (nats per token) of each answer after it, after a blank.

    A prompt longer than the model's context loses tokens at its beginning.
    """
    longest = context_length(scorer.model)
    encoded = []
    for prompt in prompts:
        for answer in answers:
            ids, start = encode_pair(tokenizer, prompt, answer)
            cut = max(len(ids) - longest, 0)
            encoded.append(Scored(tuple(ids[cut:]), max(start - cut, 1)))
    scores = scorer.score(encoded)
    means = [-float(scores[scored].nll.mean()) for scored in encoded]
    return [means[i : i + len(answers)] for i in range(0, len(means), len(answers))]
