"""Where a subject and a target lie among a text's tokens, the plain way: decode the tokens one more at a time.

Written without `sphere.values`, which it is an oracle of; for tokenizers that decode what they encode.
"""

from __future__ import annotations

from typing import Any

from sphere.requests import EditRequest


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids with what the tokenizer puts before a text, without an EOS behind it."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def covering(tokenizer: Any, ids: list[int], n_characters: int) -> int:
    """Index of the first token with which the decoded text has so many characters."""
    for end in range(1, len(ids) + 1):
        if len(tokenizer.decode(ids[:end], skip_special_tokens=True)) >= n_characters:
            return end - 1
    raise ValueError(f"the tokens {ids} decode to fewer than {n_characters} characters")


def completing(tokenizer: Any, ids: list[int], text: str) -> int:
    """Index of the first token with which all of `text` is decoded, its last character whole."""
    for end in range(1, len(ids) + 1):
        if tokenizer.decode(ids[:end], skip_special_tokens=True).startswith(text):
            return end - 1
    raise ValueError(f"the tokens {ids} do not decode to {text!r}")


def to_subject(tokenizer: Any, template: str, request: EditRequest) -> tuple[str, list[int]]:
    """A request in a context template: the text, and its tokens up to the one that ends the subject."""
    before, after = template.replace("{}", request.prompt).split("{}")
    text = before + request.subject + after
    ids = token_ids(tokenizer, text)
    return text, ids[: completing(tokenizer, ids, before + request.subject.rstrip()) + 1]


def with_target(tokenizer: Any, text: str, target: str) -> tuple[list[int], int]:
    """Tokens of a text with its target behind it, and the index of the target's first one."""
    ids = token_ids(tokenizer, f"{text} {target.lstrip()}")
    return ids, covering(tokenizer, ids, len(text) + 1)
