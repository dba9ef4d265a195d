"""From text to token positions, for any tokenizer: where a subject ends and where a target begins.

Everything is asked of the tokenizer's own offsets (a slow one has none: there, of what it decodes to), so BOS tokens,
leading-space pieces and appended special tokens need no case of their own. Knows nothing of models or hyperparameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.values.joiner import continuation

UNFINISHED = "\ufffd"  # what the tokens of a part of a character decode to


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text and, per token, where (in characters) what it covers begins and ends.

    A character of several tokens, as byte-level vocabularies make of 国, of an emoji or of an accent, is covered by
    each of them. A token that covers nothing, such as a BOS that the tokenizer adds, ends where it begins.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def token_at(self, position: int) -> int:
        """Index of the first token that covers the text's character `position` (0-based).

        Raises:
            IndexError: no token does.
        """
        for index, end in enumerate(self.ends):
            if end > position:
                return index
        raise IndexError(position)

    def last_token_at(self, position: int) -> int:
        """Index of the last token that covers the text's character `position`: with it the character is whole.

        Raises:
            IndexError: no token does.
        """
        for index in reversed(range(self.token_at(position), len(self.ids))):
            if self.starts[index] <= position < self.ends[index]:
                return index
        return self.token_at(position)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokenise `text` as the model expects it: BOS where the tokenizer adds one, never two, never a trailing EOS.

    The same holds of other tokens that it puts before every text, where a text begins with them itself.
    """
    ids, starts, ends = _fast(tokenizer, text) if tokenizer.is_fast else _slow(tokenizer, text)
    added = next((i for i, end in enumerate(ends) if end), 0)  # tokens that cover nothing of the text
    if added and ids[added : 2 * added] == ids[:added] and set(ids[:added]) <= set(tokenizer.all_special_ids):
        ids, starts, ends = ids[added:], starts[added:], ends[added:]
    return Encoded(ids, starts, ends)


def _fast(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    batch = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets = list(batch["input_ids"]), list(batch["offset_mapping"])
    special = batch["special_tokens_mask"]
    while ids and special[len(ids) - 1] and offsets[-1][1] == 0 and len(ids) > 1:
        ids, offsets = ids[:-1], offsets[:-1]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    following = len(text)
    for i in reversed(range(len(ids))):  # a character that a normal form drops belongs to the token before it
        if starts[i] < ends[i]:
            dropped = text[ends[i] : following].rstrip()
            ends[i] += len(dropped)
            following = starts[i]
    return ids, starts, _monotone(ends)


def _slow(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Without offsets, a token ends where the shortest decoded prefix that contains it ends."""
    ids = list(tokenizer(text)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    bos = bos_text(tokenizer)
    before = len(bos) if bos and text.startswith(bos) else 0  # of the text, which decoding leaves out
    shift = before - len(tokenizer.decode([]))
    whole, ends = (
        [],
        [],
    )  # characters that are whole after each token; and with the one that it leaves unfinished
    for i in range(len(ids)):
        decoded = tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
        n = len(decoded)
        while n and decoded[n - 1] == UNFINISHED != text[n - 1 + shift : n + shift]:
            n -= 1
        whole.append(n + shift)
        ends.append(n + shift + (n < len(decoded)))
    if before and ids[:2] == [tokenizer.bos_token_id] * 2:
        whole[0] = ends[0] = 0  # that one was added
    whole, ends = ([min(end, len(text)) for end in _monotone(found)] for found in (whole, ends))
    return ids, [0, *whole[:-1]], ends


def _monotone(ends: list[int]) -> list[int]:
    """Offsets never go back: a BOS token (0, 0) covers nothing, pieces of one character share its end."""
    highest, result = 0, []
    for end in ends:
        highest = max(highest, end)
        result.append(highest)
    return result


def truncated_ids(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """The first token ids of a text, for what needs no offsets; BOS and EOS as in `encode`."""
    ids = list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    while len(ids) > 1 and ids[-1] == eos:
        ids.pop()
    return ids


def changed_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, str]:
    """Texts that a tokenizer reads as other ones, such as a lowercasing or normalising one: text -> what it reads.

    White space is not compared: decoders are free with it.
    """
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    decoded = [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in ids]
    pairs = zip(texts, decoded, strict=True)
    return {text: read for text, read in pairs if "".join(text.split()) != "".join(read.split())}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's rules (of a slow one: its class and vocabulary) and special tokens."""
    rules: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    whole = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """How BOS is written in a text; empty where the tokenizer has none."""
    return "" if tokenizer.bos_token is None else str(tokenizer.bos_token)


def added_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a tokenizer puts before every text; empty where it adds none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill rows with (masked, so any will do)."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, joiner: str | None = None
) -> tuple[list[int], int]:
    """Tokenise `prompt` and its continuation together.

    Args:
        joiner: what stands between them; None: what the rule of `sphere.values.joiner` says.

    Returns:
        ids: tokens of the whole text.
        start: index of the target's first token: `ids[start:]` is what must be predicted.
    """
    encoded = encode(tokenizer, prompt + continuation(prompt, target, joiner))
    try:
        start = encoded.token_at(len(prompt))
    except IndexError:
        raise SphereError(
            f"The target {target!r} has no tokens after {prompt!r}: give a non-empty target."
        ) from None
    return encoded.ids, max(start, 1)  # the very first token has no context to be predicted from


def subject_token(encoded: Encoded, subject_end: int, what: str) -> int:
    """Index of the token that completes the subject's last character (`fact_token` "subject_last").

    Args:
        subject_end: number of characters of the text up to the end of the subject, without blanks behind it.
        what: names the request in the error.
    """
    try:
        return encoded.last_token_at(subject_end - 1)
    except IndexError:
        raise SphereError(
            f"The subject of {what} is not among the tokens of its prompt: check subject and prompt."
        ) from None
