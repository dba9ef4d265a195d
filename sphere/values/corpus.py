"""Text for second moments, as token ids: hub corpora, a local file, or text that the model samples itself.

Knows nothing of what is done with the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.generate import generate
from sphere.values.tokenization import padding_id, truncated_ids

log = logging.getLogger(__name__)

SELF = "self"
# name in the hyperparameters -> (hub id, configuration, split)
HUB = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
}
SAMPLED_TOKENS = 100
MAX_TOKENS = 1024


def corpus_key(source: str, n_documents: int, seed: int, max_tokens: int) -> dict[str, Any]:
    """Everything that decides the corpus' text, JSON-able: part of the name under which statistics are kept.

    Raises:
        SphereError: neither a known corpus nor a file.
    """
    key: dict[str, Any] = {"source": source, "n_documents": n_documents}
    if source == SELF:
        return key | {"seed": seed, "max_tokens": min(SAMPLED_TOKENS, max_tokens)}
    key["max_tokens"] = max_tokens
    if source in HUB:
        return key | {"hub": list(HUB[source])}
    return key | {"sha256": hashlib.sha256(_local(source).read_bytes()).hexdigest()}


def documents(
    source: str,
    n_documents: int,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> Iterator[list[int]]:
    """Token ids of up to `n_documents` documents, each cut at `max_tokens`.

    Args:
        source: "wikipedia", "wikitext", "self", or a path to a .txt (one document per line) or .jsonl ("text") file.

    Raises:
        SphereError: unknown source, no network for a hub corpus, unreadable or empty file.
    """
    if source == SELF:
        yield from sample_documents(
            model, tokenizer, n_documents, min(SAMPLED_TOKENS, max_tokens), seed, progress
        )
        return
    texts = _hub_texts(source) if source in HUB else _file_texts(_local(source))
    count = 0
    for text in texts:
        if count == n_documents:
            break
        ids = truncated_ids(tokenizer, text, max_tokens) if text.strip() else []
        if ids:
            count += 1
            yield ids
    if not count:
        raise SphereError(f"The corpus '{source}' holds no text: give mom2_dataset another one.")
    if count < n_documents:
        log.warning(
            "The corpus '%s' has %d documents, fewer than mom2_n_samples %d.", source, count, n_documents
        )


def _local(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise SphereError(
            f"mom2_dataset '{source}' is neither one of {', '.join([*HUB, SELF])} nor a .txt or .jsonl file: "
            "correct it in the hyperparameter file."
        )
    return path


def _hub_texts(source: str) -> Iterator[str]:
    name, configuration, split = HUB[source]
    try:
        import datasets

        for row in datasets.load_dataset(name, configuration, split=split, streaming=True):
            yield row["text"]
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SphereError(
            f"Cannot stream '{source}' from {name} ({reason}): check the network, or set mom2_dataset to a local "
            f".txt/.jsonl file or to '{SELF}' in the hyperparameter file."
        ) from error


def _file_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if path.suffix != ".jsonl":
                yield line
                continue
            try:
                yield json.loads(line)["text"] if line.strip() else ""
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise SphereError(
                    f'Line {number} of {path} is not a JSON object with a "text" key: correct or remove it.'
                ) from error


@torch.no_grad()
def sample_documents(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_documents: int,
    n_tokens: int,
    seed: int,
    progress: bool = True,
    batch: int = 100,
) -> list[list[int]]:
    """Documents that the model writes itself: a random first token, then ancestral sampling at temperature 1.

    The data-free calibration text of LLM-QAT (Liu et al. 2023, section 3.1); the same seed gives the same text.
    """
    device = model.get_input_embeddings().weight.device
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=n_tokens - 1,
        max_new_tokens=n_tokens - 1,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    result: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        bar = tqdm(total=n_documents, desc="sampling text", unit="doc", leave=False, disable=not progress)
        while len(result) < n_documents:
            size = min(batch, n_documents - len(result))
            first = ordinary[torch.randint(len(ordinary), (size,))][:, None]  # documents x 1
            result += generate(model, first.tolist(), config).tolist()
            bar.update(size)
        bar.close()
    return result
