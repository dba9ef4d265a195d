"""Finding the subject of a prompt whose row does not name it: the longest span that a list or a rule names.

A list of names comes first (the user's, or the subjects that other rows name). Behind it stands a rule on spelling, by
spaCy's matcher: a run of words that begin with a capital letter or a digit, with joining words such as "of" inside.
It knows no language's grammar and no entities; where it finds none or several of one length, it says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

JOINING = ("of", "the", "de", "la", "le", "du", "da", "van", "von", "der", "and", "&", "for", "in", "'s", "-")


class SubjectFinder:
    """Finds subjects in prompts.

    Args:
        names: subjects that are known; the longest one that a prompt holds as whole words is its subject.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = sorted({name.strip() for name in names if name.strip()}, key=len, reverse=True)

    def find(self, prompt: str) -> str | None:
        """The subject of a prompt, as it is written there; None where nothing names it, or two spans alike."""
        return self._named(prompt) or self._spelled(prompt)

    def _named(self, prompt: str) -> str | None:
        return next((name for name in self.names if word_span(prompt, name)), None)

    def _spelled(self, prompt: str) -> str | None:
        document = self._nlp(prompt)
        spans = [document[start:end] for _, start, end in self._matcher(document)]
        spans = [span[1:] if span[0].i == 0 and span[0].is_stop else span for span in spans]  # "What", "The"
        texts = list(dict.fromkeys(span.text for span in spans if len(span)))
        texts.sort(key=len, reverse=True)
        if not texts or (len(texts) > 1 and len(texts[0]) == len(texts[1])):
            return None
        return texts[0]

    @cached_property
    def _nlp(self) -> Any:
        import spacy  # seconds to load, and only rows without a subject need it

        return spacy.blank("en")

    @cached_property
    def _matcher(self) -> Any:
        from spacy.matcher import Matcher

        capital: dict[str, Any] = {"SHAPE": {"REGEX": "^X"}}
        inner: dict[str, Any] = {"SHAPE": {"REGEX": "^[Xd]"}}
        joining: dict[str, Any] = {"LOWER": {"IN": list(JOINING)}}
        matcher = Matcher(self._nlp.vocab)
        run = [capital, {**inner, "OP": "*"}]
        joined = [*run, {**joining, "OP": "+"}, inner, {**inner, "OP": "*"}]
        twice = [*joined, {**joining, "OP": "+"}, inner, {**inner, "OP": "*"}]
        matcher.add("subject", [run, joined, twice], greedy="LONGEST")
        return matcher


def word_span(text: str, part: str) -> tuple[int, int] | None:
    """Where `part` first stands in `text` as whole words, as (start, end); None where it does not."""
    found = re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text)
    return found.span() if found else None


def with_place(text: str, subject: str) -> str | None:
    """`text` with "{}" in the subject's place: where it first stands as whole words, else as part of one.

    None where it does not stand there.
    """
    span = word_span(text, subject)
    if span is None:
        start = text.find(subject)
        if start < 0:
            return None
        span = start, start + len(subject)
    return f"{text[: span[0]]}{{}}{text[span[1] :]}"
