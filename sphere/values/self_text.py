"""Text that a model writes itself, as token ids: the corpus "self", sampled here or shipped with the project.

    data/self_text/<model>.safetensors    token_ids (documents x tokens) int32; metadata: "key", JSON of `sampling_key`

Sampling takes minutes, and one token that another processor rounds differently changes all that follow. So the text of
the default model is shipped, and used wherever the key fits; `python -m scripts.sample_self_text` writes such a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from sphere.files import atomic_path
from sphere.forward.generate import generate
from sphere.resources import shipped
from sphere.values.tokenization import added_bos, padding_id

log = logging.getLogger(__name__)

SHIPPED = shipped("data/self_text")
N_TOKENS = 100  # of a document
ROWS = 100  # documents sampled together: with the seed, they decide the text


def sampling_key(
    fingerprint: str, tokenizer: PreTrainedTokenizerBase, seed: int, n_tokens: int
) -> dict[str, Any]:
    """What decides sampled text, beside the rounding of the machine; JSON-able.

    Args:
        fingerprint: of the whole model.
    """
    key = {
        "model": fingerprint,
        "vocabulary": len(tokenizer),
        "special_ids": sorted(tokenizer.all_special_ids),
        "eos": tokenizer.eos_token_id,
        "seed": seed,
        "n_tokens": n_tokens,
        "rows": ROWS,
    }
    begin = added_bos(tokenizer)
    return key | {"begin": begin} if begin else key


def shipped_documents(
    key: dict[str, Any], n_documents: int, folder: Path | None = None
) -> list[list[int]] | None:
    """The documents of a shipped file with this key, where sampling so many begins with them; else None."""
    for path in sorted((folder or SHIPPED).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if json.loads((file.metadata() or {}).get("key", "null")) != key:
                    continue
                ids = file.get_tensor("token_ids")  # documents x tokens
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("The sampled text in %s cannot be read (%s): it is not used.", path, error)
            continue
        # Documents are drawn in batches: other sizes of the last batch would draw other random numbers.
        if n_documents == len(ids) or (n_documents < len(ids) and n_documents % ROWS == 0):
            log.info("Text that the model wrote itself: the first %d documents of %s.", n_documents, path)
            return ids[:n_documents].tolist()
    return None


def write_documents(path: Path, documents: Sequence[Sequence[int]], key: dict[str, Any]) -> None:
    """Write documents of equal length as a file that `shipped_documents` finds."""
    ids = torch.tensor(documents, dtype=torch.int32)
    with atomic_path(path) as temporary:
        save_file({"token_ids": ids}, temporary, metadata={"key": json.dumps(key)})


def digest_of(documents: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


class _Progress(LogitsProcessor):
    """Changes nothing; counts the tokens on a bar, one per row and step."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._bar.update(len(input_ids))
        return scores


def sample_documents(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_documents: int,
    n_tokens: int,
    seed: int,
    progress: bool = True,
) -> list[list[int]]:
    """Documents that the model writes itself: a random first token, then ancestral sampling at temperature 1.

    Before the first token stands BOS where the tokenizer puts it before every text.

    The data-free calibration text of LLM-QAT (Liu et al. 2023, section 3.1), from the model's whole distribution,
    whatever generation defaults it brings along; on one machine the same seed gives the same text.

    Returns:
        n_documents lists of n_tokens token ids.
    """
    device = model.get_input_embeddings().weight.device
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    begin = added_bos(tokenizer)
    n_new = n_tokens - len(begin) - 1
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=n_new,
        max_new_tokens=n_new,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    result: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        bar = tqdm(
            total=n_documents * n_new, desc="sampling text", unit="tok", leave=False, disable=not progress
        )
        while len(result) < n_documents:
            size = min(ROWS, n_documents - len(result))
            first = ordinary[torch.randint(len(ordinary), (size,))][:, None]  # documents x 1
            result += generate(
                model, [begin + row for row in first.tolist()], config, _Progress(bar)
            ).tolist()
        bar.close()
    return result
