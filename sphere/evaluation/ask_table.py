"""Answers of several states of a model as text: a column for each state, and what a comparison of many comes to."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

from sphere.answers import UNEDITED, Asked

FALLBACK_WIDTH = 100
HEAD = 14  # characters of a row's name
SMALLEST_COLUMN = 16


def to_json(asked: Asked) -> dict[str, Any]:
    """One prompt with its answers, JSON-able."""
    return dataclasses.asdict(asked)


def format_asked(asked: Asked, width: int | None = None) -> str:
    """A prompt, and below it a column for each state.

    Args:
        width: characters of a line; None: the terminal's.
    """
    width = width or shutil.get_terminal_size((FALLBACK_WIDTH, 24)).columns
    labels = list(asked.answers)
    column = max((width - HEAD) // len(labels) - 2, SMALLEST_COLUMN)
    said = list(asked.answers.values())
    rows = [("", labels), ("continuation", [_shown(answer.text) for answer in said])]
    for place in range(max(len(answer.next_tokens) for answer in said)):
        cells = [
            _likely(*answer.next_tokens[place]) if place < len(answer.next_tokens) else "" for answer in said
        ]
        rows.append(("" if place else "next token", cells))
    for target in said[0].targets:
        rows.append((f"p({target})", [_percent(answer.targets[target]) for answer in said]))
    lines = [f"> {_shown(asked.prompt)}"]
    for name, cells in rows:
        lines += _row(name, cells, column)
    return "\n".join(lines) + "\n"


def format_comparison(asked: Sequence[Asked]) -> str:
    """What the answers to many prompts come to, a line for each state but the unedited one."""
    lines = []
    for label in asked[0].answers:
        before = next((one for one in (f"{UNEDITED} {label}", UNEDITED) if one in asked[0].answers), None)
        if label.startswith(UNEDITED):
            continue
        pairs = [(one.answers[before] if before else None, one.answers[label]) for one in asked]
        parts = []
        if before:
            differ = sum(a is not None and a.text != b.text for a, b in pairs)
            parts.append(f"{differ} of {len(pairs)} continuations differ from the unedited ones")
        if first := [(a, b, next(iter(b.targets))) for a, b in pairs if b.targets]:
            mean = statistics.fmean(b.targets[t] for _, b, t in first)
            told = f"the first target has a mean probability of {_percent(mean)}"
            if before:
                told += f" ({_percent(statistics.fmean(a.targets[t] for a, _, t in first if a))} unedited)"
            parts.append(told)
        lines.append(f"{label}: {'; '.join(parts)}.")
    return "\n".join(lines)


def _likely(token: str, probability: float) -> str:
    return f"{_percent(probability):>8}  {token!r}"


def _percent(probability: float) -> str:
    """Three digits, so that a hundredth of a percent is told from nothing."""
    percent = 100 * probability
    return f"{percent:.1f} %" if percent >= 1 or not percent else f"{percent:.1g} %"


def _shown(text: str) -> str:
    """A text on one line."""
    return text.replace("\n", "\\n")


def _row(name: str, cells: Sequence[str], column: int) -> list[str]:
    """Lines of one row of the table, as many as its longest cell takes."""
    blocks = [_wrapped(name, HEAD - 2), *(_wrapped(cell, column) for cell in cells)]
    widths = [HEAD - 2, *[column] * len(cells)]
    lines = []
    for i in range(max(map(len, blocks))):
        parts = [b[i] if i < len(b) else "" for b in blocks]
        lines.append("  ".join(_padded(p, w) for p, w in zip(parts, widths, strict=True)).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many columns of the terminal; wide characters take two."""
    wide = _columns(text) > len(text)
    return textwrap.wrap(text, width // 2 if wide else width, drop_whitespace=False) or [""]


def _padded(text: str, width: int) -> str:
    return text + " " * max(width - _columns(text), 0)


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
