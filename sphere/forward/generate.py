"""Continuing rows of token ids, whatever generation defaults a model brings along.

`generate` of transformers fills in whatever a call leaves open from the model's own generation_config.json: penalties,
temperature, top_p, tokens that end a text. Here its configuration alone decides. Knows models and token ids;
knows nothing of texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from sphere.forward.padding import pad_left


@torch.no_grad()
def generate(
    model: Any,
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    logits_processor: LogitsProcessor | None = None,
    stopping: StoppingCriteria | None = None,
) -> Tensor:
    """Continue rows of token ids (none of them empty) in one batch with a KV cache.

    Args:
        config: all that decides how; its pad_token_id fills the rows up on the left. What it leaves open has the
            defaults of transformers, never those of the model.
        logits_processor: one more, after those that the configuration asks for.
        stopping: one more criterion of when a row ends.

    Returns:
        (rows x (width + new tokens)), padding included, where width is the longest row.
    """
    device, width = model.get_input_embeddings().weight.device, max(map(len, rows))
    pad = int(config.pad_token_id)
    with plain_generation(model):
        return model.generate(
            input_ids=pad_left(rows, width, pad, device),
            attention_mask=pad_left([[1] * len(row) for row in rows], width, 0, device),
            generation_config=config,
            logits_processor=[logits_processor] if logits_processor is not None else [],
            stopping_criteria=[stopping] if stopping is not None else [],
        )


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Within the block `generate` knows no defaults of the model's own: no penalties, no token that ends a text."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
