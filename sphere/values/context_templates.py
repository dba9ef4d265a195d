"""Context templates: short beginnings, written by the model itself, that a fact is put behind.

Two groups, as MEMIT has them: the bare prompt, and five continuations of "The", "Therefore", "Because", "I", "You",
each by 10 tokens sampled from the 5 likeliest, whatever generation defaults the model brings along.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sphere.forward.generate import generate
from sphere.requests import EditRequest
from sphere.values.tokenization import encode, padding_id

log = logging.getLogger(__name__)

BARE = "{}"
BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
N_TOKENS = 10
TOP_K = 5


@dataclass(frozen=True)
class Filled:
    """A text with its subject in place, and the number of characters up to the subject's end, blanks left out."""

    text: str
    subject_end: int


def fill(template: str, request: EditRequest, bos: str = "") -> Filled:
    """Put a request's prompt and subject into a template such as "The sky is blue. {}".

    Args:
        bos: how BOS is written in a text: a prompt that begins with it leaves it at the very front.
    """
    prompt = template.replace(BARE, request.prompt)
    if bos and request.prompt.startswith(bos):
        prompt = bos + template.removeprefix(bos).replace(BARE, request.prompt.removeprefix(bos))
    end = prompt.index("{}") + len(request.subject.rstrip())
    return Filled(prompt.replace("{}", request.subject), end)


def generate_context_templates(
    model: Any, tokenizer: PreTrainedTokenizerBase, seed: int, n: int = len(BEGINNINGS)
) -> tuple[tuple[str, ...], ...]:
    """Groups of templates: (("{}",), (n sampled ones,)), or the first alone for n = 0; a seed gives the same ones."""
    device = model.get_input_embeddings().weight.device
    config = GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        max_new_tokens=N_TOKENS,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    templates = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for beginning in BEGINNINGS[:n]:
            ids = generate(model, [encode(tokenizer, beginning).ids], config)
            text = str(tokenizer.decode(ids[0], skip_special_tokens=True))
            templates.append(text.replace("{", " ").replace("}", " ") + ". {}")
    log.info("Context templates: %s", templates)
    return ((BARE,), tuple(templates)) if templates else ((BARE,),)
