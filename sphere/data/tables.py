"""Rows of a table that somebody wrote: CSV, TSV, JSON or JSON Lines, from a file or standard input.

A row keeps its place in the file, so that whatever is wrong with it can be said with a number that an editor shows.
Knows nothing of facts.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere.errors import SphereError

STANDARD_INPUT = "-"
FORMS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
# A byte order mark says how a text is encoded; the longer ones come first, as UTF-32's begins with UTF-16's.
MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
SEPARATORS = (",", "\t", ";")


@dataclass(frozen=True)
class Row:
    """One row, with the names of its columns.

    Attributes:
        number: the line that it begins on (CSV, TSV, JSON Lines), or its place in a JSON list, from 1.
    """

    number: int
    values: Mapping[str, Any]


def read_table(source: str | Path) -> list[Row]:
    """The rows of a table; blank lines are left out.

    Args:
        source: a file whose ending says its form (.csv, .tsv, .json, .jsonl), or "-" for standard input, whose form is
            told by how it begins.

    Raises:
        SphereError: no such file, an unknown form, an encoding that is not Unicode, a file that breaks its form's
            rules (with the line), or one without rows.
    """
    name = "standard input" if str(source) == STANDARD_INPUT else str(source)
    text = _decode(_bytes(source, name), name)
    if not text.strip():
        raise SphereError(f"{name} is empty: give a table of facts.", argument="facts")
    form = _form(source, text)
    rows = {"json": _json, "jsonl": _json_lines}.get(form, _separated)(text, name)
    if not rows:
        raise SphereError(f"{name} has a head but no rows: give at least one fact.", argument="facts")
    return rows


def _bytes(source: str | Path, name: str) -> bytes:
    if str(source) == STANDARD_INPUT:
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        raise SphereError(f"No table of facts at {name}: check the path.", argument="facts") from error
    except OSError as error:
        raise SphereError(f"Cannot read {name}: {error.strerror or error}.", argument="facts") from error


def _decode(content: bytes, name: str) -> str:
    """UTF-8, or what a byte order mark says. Other encodings are refused: each would read as something."""
    encoding = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SphereError(
            f"{name} is not {encoding.removesuffix('-sig').upper()} text: line {line} holds the byte "
            f"0x{content[error.start]:02X} where none may be; save the file as UTF-8.",
            argument="facts",
        ) from error


def _form(source: str | Path, text: str) -> str:
    """csv, tsv, json or jsonl."""
    if str(source) == STANDARD_INPUT:
        start = text.lstrip()[0]
        return {"[": "json", "{": "jsonl"}.get(start, "csv")
    suffix = Path(source).suffix.lower()
    if suffix not in FORMS:
        raise SphereError(
            f"{source} is none of {', '.join(FORMS)}: give it the ending that says what it is.",
            argument="facts",
        )
    return FORMS[suffix]


def parse_json(text: str) -> Any:
    """JSON as pandas and others write it: NaN is a cell that holds nothing, and becomes None."""
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def _json(text: str, name: str) -> list[Row]:
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise SphereError(
            f"{name} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}).",
            argument="facts",
        ) from error
    if not isinstance(content, list):
        raise SphereError(
            f"{name} should hold a list of objects, got {type(content).__name__}: put the facts into [ ].",
            argument="facts",
        )
    return [_row(number, entry, name) for number, entry in enumerate(content, 1)]


def _json_lines(text: str, name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # other line breaks may stand inside of a text
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except json.JSONDecodeError as error:
            raise SphereError(
                f"Line {number} of {name} is not valid JSON (column {error.colno}: {error.msg}).",
                argument="facts",
            ) from error
        rows.append(_row(number, entry, name))
    return rows


def _row(number: int, entry: object, name: str) -> Row:
    if not isinstance(entry, dict):
        raise SphereError(
            f"Row {number} of {name} should be an object with keys, got {entry!r:.60}.", argument="facts"
        )
    return Row(number, entry)


def _separated(text: str, name: str) -> list[Row]:
    """CSV or TSV: the separator is the one that the head has most of."""
    head = text.lstrip("\r\n").split("\n", 1)[0]
    separator = max(SEPARATORS, key=head.count)
    lines = _lines(text, separator, name)
    _, columns = next(lines)
    columns = [column.strip() for column in columns]
    if repeated := {column for column in columns if column and columns.count(column) > 1}:
        raise SphereError(
            f"The head of {name} names {', '.join(sorted(repeated))} twice: rename one.", argument="facts"
        )
    rows = []
    for number, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(columns):
            raise SphereError(
                f"Line {number} of {name} has {len(cells)} fields, its head {len(columns)}: put texts that hold a "
                f"{separator!r} into quotes.",
                argument="facts",
            )
        rows.append(Row(number, dict(zip(columns, cells, strict=False))))
    return rows


def _lines(text: str, separator: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """(line that it begins on, fields) of each row, the head included."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise SphereError(
                f"The row that begins on line {begins} of {name} breaks CSV's rules ({error}): a text with a quote in "
                'it stands in quotes, and the quote is doubled ("").',
                argument="facts",
            ) from error
        if fields:
            yield begins, fields
