"""Text for second moments, as token ids: hub corpora, a local file, or text that the model samples itself.

Knows nothing of what is done with the text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError, first_line
from sphere.requests import check_encodable
from sphere.resources import find
from sphere.values import self_text
from sphere.values.tokenization import tokenizer_digest, truncated_ids

log = logging.getLogger(__name__)

SELF = "self"
# name in the hyperparameters -> (hub id, snapshot, split)
HUB = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
}
SHUFFLE_BUFFER = 10_000  # documents of a streamed corpus that one is drawn from
MAX_TOKENS = 1024


@dataclass
class Corpus:
    """Up to `n_documents` documents of a source, the same ones for the same seed.

    Attributes:
        source: "wikipedia", "wikitext", "self", or a path to a .txt (one document per line) or .jsonl ("text") file.
        seed: of what is drawn: streamed articles, sampled text.
        max_tokens: at which each document is cut.
        model: writes the text of "self".
        fingerprint: of the whole model.
    """

    source: str
    n_documents: int
    seed: int
    max_tokens: int
    model: Any
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides the token ids, but for how a machine rounds where it samples them; JSON-able.

        Raises:
            SphereError: neither a known corpus nor a file.
        """
        key: dict[str, Any] = {"source": self.source, "n_documents": self.n_documents}
        if self.source == SELF:
            if self._shipped is not None:
                return key | {"token_ids": self_text.digest_of(self._shipped)}
            return key | self._sampling
        key |= {"max_tokens": self.max_tokens, "tokenizer": tokenizer_digest(self.tokenizer)}
        if self.source in HUB:
            return key | {
                "hub": list(HUB[self.source]),
                "shuffle": {"seed": self.seed, "buffer": SHUFFLE_BUFFER},
                "datasets": importlib.metadata.version("datasets"),
            }
        return key | {"sha256": hashlib.sha256(_local(self.source).read_bytes()).hexdigest()}

    def documents(self, progress: bool = True) -> Iterator[list[int]]:
        """Token ids of the documents, none of them empty.

        Raises:
            SphereError: unknown source, no network for a hub corpus, unreadable or empty file.
        """
        if self.source == SELF:
            if self._shipped is not None:
                yield from self._shipped
                return
            n_tokens = self._sampling["n_tokens"]
            yield from self_text.sample_documents(
                self.model, self.tokenizer, self.n_documents, n_tokens, self.seed, progress
            )
            return
        texts = self._hub_texts() if self.source in HUB else _file_texts(_local(self.source))
        count = 0
        for text in texts:
            if count == self.n_documents:
                break
            ids = truncated_ids(self.tokenizer, text, self.max_tokens) if text.strip() else []
            if ids:
                count += 1
                yield ids
        if not count:
            raise SphereError(f"The corpus '{self.source}' holds no text: give mom2_dataset another one.")
        if count < self.n_documents:
            log.warning(
                "The corpus '%s' has %d documents, fewer than mom2_n_samples %d.",
                self.source,
                count,
                self.n_documents,
            )

    @property
    def _sampling(self) -> dict[str, Any]:
        n_tokens = min(self_text.N_TOKENS, self.max_tokens)
        return self_text.sampling_key(self.fingerprint, self.tokenizer, self.seed, n_tokens)

    @cached_property
    def _shipped(self) -> list[list[int]] | None:
        return self_text.shipped_documents(self._sampling, self.n_documents)

    def _hub_texts(self) -> Iterator[str]:
        """Articles in a random order: shards of the stream are shuffled, and articles drawn from a buffer of them."""
        name, snapshot, split = HUB[self.source]
        log.info(
            "Corpus '%s': %s, snapshot %s, shuffled with seed %d in a buffer of %d documents.",
            self.source,
            name,
            snapshot,
            self.seed,
            SHUFFLE_BUFFER,
        )
        try:
            import datasets

            stream = datasets.load_dataset(name, snapshot, split=split, streaming=True)
            for row in stream.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER):
                yield row["text"]
        except Exception as error:  # the hub client raises many kinds
            raise SphereError(
                f"Cannot stream '{self.source}' from {name} ({first_line(error)}): check the network, or set "
                f"mom2_dataset to a local .txt/.jsonl file or to '{SELF}' in the hyperparameter file."
            ) from error


def _local(source: str) -> Path:
    path = find(source)
    if not path.is_file():
        raise SphereError(
            f"mom2_dataset '{source}' is neither one of {', '.join([*HUB, SELF])} nor a .txt or .jsonl file: "
            "correct it in the hyperparameter file."
        )
    return path


def _file_texts(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _text_of(line, f"line {number} of {path}") if path.suffix == ".jsonl" else line
    except UnicodeDecodeError as error:
        raise SphereError(f"The corpus {path} is not text in UTF-8: convert it.") from error


def _text_of(line: str, where: str) -> str:
    """The text of a line of a .jsonl file; none of a blank line."""
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise SphereError(f'The {where} is not a JSON object with a text as "text": correct or remove it.')
    check_encodable(text, f"'text' in {where}")
    return text
