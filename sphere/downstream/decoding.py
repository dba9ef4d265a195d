"""Greedy continuation of many prompts, batched by length.

Knows models and tokenizers, nothing of tasks or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sphere.forward.generate import generate
from sphere.forward.padding import group_by_length
from sphere.forward.passes import PassOptions
from sphere.values.tokenization import encode, padding_id


def greedy_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    passes: PassOptions | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Yield batches of (index of the prompt, decoded continuation), longest prompts first.

    A prompt longer than the model's context loses tokens at its beginning. Of the model's own generation defaults only
    the tokens that end a text are heeded.
    """
    room = context_length(model) - max_new_tokens
    rows = [encode(tokenizer, prompt).ids[-room:] for prompt in prompts]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=model.generation_config.eos_token_id,
    )
    groups = group_by_length([len(row) for row in rows], (passes or PassOptions()).decoding_tokens)
    for group in reversed(groups):
        ids = generate(model, [rows[i] for i in group], config)  # b x (t + new)
        width = max(len(rows[i]) for i in group)
        texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        yield list(zip(group, texts, strict=True))


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence that the model takes."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)
