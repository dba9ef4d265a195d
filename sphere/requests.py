"""What to edit: one fact, and the checks that a list of them is sound.

Knows nothing of models, tokenizers or datasets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sphere.errors import SphereError

log = logging.getLogger(__name__)

NAMED = 3  # cases that a warning names


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: `prompt` (with `{}` for the subject) is to be continued by `target_new`.

    Attributes:
        case_id: the record's number in its dataset.
        prompt: e.g. "The mother tongue of {} is".
        subject: e.g. "Danielle Darrieux".
        target_new: the object to write, without or with its leading space, e.g. "English".
        target_true: the object that it replaces, where known (evaluation only).
        joiner: what stands between a prompt and its target, e.g. "" for nothing; None: a blank where the writing and
            the prompt's end want one (`sphere.values.joiner`).

    Raises:
        SphereError: a text that is blank or cannot be encoded, a prompt without one place for its subject, or a new
            target that is the true one.
    """

    case_id: int
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    joiner: str | None = None

    def __post_init__(self) -> None:
        where = f"case {self.case_id}"
        if self.prompt.count("{}") != 1:
            raise SphereError(
                f"The prompt of {where} must name its subject's place once as '{{}}', got {self.prompt!r}."
            )
        for name in ("prompt", "subject", "target_new", "target_true"):
            if (text := getattr(self, name)) is not None:
                check_text(text, f"'{name}' of {where}")
        check_encodable(self.joiner or "", f"'joiner' of {where}")
        if self.target_true is not None and self.target_true.split() == self.target_new.split():
            raise SphereError(
                f"'target_new' and 'target_true' of {where} are the same text, {self.target_new.strip()!r}: an edit "
                "could not succeed, give another new target."
            )

    def __repr__(self) -> str:
        """All fields, but for a joiner that is not given: digests are as they were before there was one."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.joiner is None:
            del values["joiner"]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @property
    def text(self) -> str:
        """The prompt with its subject in place."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_end(self) -> int:
        """Number of characters of `text` up to the end of the subject, without blanks behind it."""
        return self.prompt.index("{}") + len(self.subject.rstrip())


def check_text(text: str, name: str) -> None:
    """Refuse a text that stands for nothing or that no tokenizer takes.

    Args:
        name: what an error calls it.

    Raises:
        SphereError: it is blank, or holds a lone surrogate (JSON's "\\ud800"), which cannot be encoded.
    """
    if not text.strip():
        raise SphereError(f"{name} is blank: give a text.")
    check_encodable(text, name)


def check_encodable(text: str, name: str) -> None:
    """Refuse a text that no tokenizer takes; see `check_text`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = f"U+{ord(text[error.start]):04X}"
        raise SphereError(
            f"{name} holds half of a surrogate pair, {wrong} at character {error.start}, no character: correct it."
        ) from error


def named_cases(requests: Sequence[EditRequest]) -> str:
    """ "case 3 'Ann ', case 5 'Bo ' and 7 more", by their subjects."""
    named = ", ".join(f"case {r.case_id} {r.subject!r}" for r in requests[:NAMED])
    return named if len(requests) <= NAMED else f"{named} and {len(requests) - NAMED} more"


def check_batch(requests: Sequence[EditRequest]) -> list[str]:
    """Report (and log) what is odd about the requests of one batch; returns the sentences.

    That is requests that repeat or contradict one another, and subjects with blanks behind them.
    """
    seen: dict[tuple[str, str], EditRequest] = {}
    warnings = []
    if ending := [request for request in requests if request.subject != request.subject.rstrip()]:
        warnings.append(
            f"Subjects end in a blank ({named_cases(ending)}): they are edited at the last token before it, and their "
            "prompts stay as they are."
        )
    for request in requests:
        first = seen.setdefault((request.subject, request.prompt), request)
        if first is request:
            continue
        same = first.target_new.strip() == request.target_new.strip()
        kind = "repeats" if same else "contradicts"
        warnings.append(
            f"Case {request.case_id} {kind} case {first.case_id} in one batch: {request.text!r} -> "
            f"{request.target_new.strip()!r} and {first.target_new.strip()!r}."
        )
    for warning in warnings:
        log.warning("%s", warning)
    return warnings
