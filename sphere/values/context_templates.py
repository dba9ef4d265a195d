"""Context templates: short beginnings, written by the model itself, that a fact is put behind.

Two groups, as MEMIT has them: the bare prompt, and five continuations of "The", "Therefore", "Because", "I", "You".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sphere.requests import EditRequest

log = logging.getLogger(__name__)

BARE = "{}"
BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
N_TOKENS = 10
TOP_K = 5


@dataclass(frozen=True)
class Filled:
    """A text with its subject in place, and the number of characters up to the subject's end."""

    text: str
    subject_end: int


def fill(template: str, request: EditRequest) -> Filled:
    """Put a request's prompt and subject into a template such as "The sky is blue. {}"."""
    prompt = template.replace(BARE, request.prompt)
    return Filled(prompt.replace("{}", request.subject), prompt.index("{}") + len(request.subject))


def generate_context_templates(
    model: Any, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[tuple[str, ...], ...]:
    """Groups of templates: (("{}",), (five sampled ones,)); the same seed gives the same ones."""
    device = model.get_input_embeddings().weight.device
    config = GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        max_new_tokens=N_TOKENS,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    templates = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for beginning in BEGINNINGS:
            inputs = tokenizer(beginning, return_tensors="pt").to(device)
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=config,
            )
            text = str(tokenizer.decode(ids[0], skip_special_tokens=True))
            templates.append(text.replace("{", " ").replace("}", " ") + ". {}")
    log.info("Context templates: %s", templates)
    return (BARE,), tuple(templates)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill rows with (masked, so any will do)."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0
