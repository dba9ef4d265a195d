"""Greedy continuation of many prompts, batched by length with padding on the left, whatever the tokenizer's default.

Knows models and tokenizers, nothing of tasks or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.forward.passes import PassOptions
from sphere.values.tokenization import encode


def greedy_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    passes: PassOptions | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Yield batches of (index of the prompt, decoded continuation), longest prompts first.

    A prompt longer than the model's context loses tokens at its beginning.
    """
    batch_tokens = (passes or PassOptions()).decoding_tokens
    room = _context(model) - max_new_tokens
    encoded = [encode(tokenizer, prompt).ids[-room:] for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, len(encoded[order[start]])))
        batch = order[start : start + size]
        texts = _continue(model, tokenizer, [encoded[i] for i in batch], max_new_tokens)
        yield list(zip(batch, texts, strict=True))
        start += size


@torch.no_grad()
def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Decode one padded batch; sampling and penalties that a model's generation config asks for are off."""
    tokens, mask = pad_left(ids, _pad_id(tokenizer))  # b x t
    device = model.device  # of the embeddings, where layers are spread
    options: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "min_p": None}
    generate: Any = model.generate
    out = generate(
        tokens.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=_pad_id(tokenizer),
        **options,
    )  # b x (t + new)
    return tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)


def pad_left(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (b x t) and attention mask (b x t), padded on the left."""
    width = max(len(row) for row in ids)
    tokens = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return tokens, mask


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _context(model: PreTrainedModel) -> int:
    """Longest sequence that the model takes."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)
