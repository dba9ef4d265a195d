"""Whether sequences fit the model's positions, found out before anything is run. Knows texts; knows no records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.requests import EditRequest
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE, fill
from sphere.values.joiner import Continued
from sphere.values.tokenization import encode
from sphere.values.z_batches import KL_PROMPT

# No character gives more tokens: one per byte of the 18 characters that Unicode's longest normal form has.
TOKENS_PER_CHARACTER = 36
AT_ONCE = 1000  # texts tokenised together
NAMED = 20  # cases that a sentence names


class CaseText(NamedTuple):
    """A text that will be run for a case, and what it is in words."""

    case_id: int
    what: str
    text: str


def longest_sequence(model: Any) -> int | None:
    """The number of a model's positions; None where it names no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def edited_texts(
    requests: Sequence[EditRequest], templates: Sequence[Sequence[str]], bos: str = "", bare: str = BARE
) -> Iterator[CaseText]:
    """What editing runs: each prompt in its contexts with its target, and the KL prompt.

    Args:
        bare: the template without a context, which the KL prompt is put into too.
    """
    for request in requests:
        for template in (template for group in templates for template in group):
            pair = Continued(fill(template, request, bos).text, request.target_new, request.joiner)
            yield CaseText(request.case_id, "prompt in its context with the new target", pair.text)
        yield CaseText(request.case_id, "subject", in_turn(bare, KL_PROMPT.format(request.subject)))


def check_lengths(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[CaseText]) -> None:
    """Check that every text fits the model's positions.

    Raises:
        SphereError: the longest text of each case that has one which does not fit.
    """
    positions = longest_sequence(model)
    if positions is None:
        return
    possible = (text for text in texts if len(text.text) * TOKENS_PER_CHARACTER >= positions)
    longest: dict[int, tuple[int, str]] = {}  # case -> tokens of its longest text, what that is
    while some := list(islice(possible, AT_ONCE)):
        rows = tokenizer([text.text for text in some])["input_ids"]
        for (case_id, what, text), ids in zip(some, rows, strict=True):
            if len(ids) > positions:
                length = len(encode(tokenizer, text).ids)  # as it will be run
                if length > max(positions, longest.get(case_id, (0, ""))[0]):
                    longest[case_id] = length, what
    if longest:
        named = [f"case {case} ({what}: {n} tokens)" for case, (n, what) in list(longest.items())[:NAMED]]
        more = f" and {len(longest) - NAMED} more" if len(longest) > NAMED else ""
        raise SphereError(
            f"Longer than the {positions} positions of {type(model).__name__}: {', '.join(named)}{more}; shorten or "
            "remove these records."
        )
