"""Tables that people write: their forms, encodings and mistakes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from sphere.data.tables import read_table
from sphere.errors import SphereError

ROWS = [{"a": "x", "b": "1,2"}, {"a": 'say "hi"', "b": "two\nlines"}]
CSV = 'a,b\nx,"1,2"\n\n"say ""hi""","two\nlines"\n'


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("t.csv", CSV, [2, 4]),
        ("t.csv", CSV.replace(",b", ";b").replace("x,", "x;").replace('""",', '""";'), [2, 4]),
        ("t.csv", CSV.replace("\n", "\r\n", 3), [2, 4]),
        (
            "t.tsv",
            CSV.replace(",b", "\tb").replace("x,", "x\t").replace('""",', '""";').replace(";", "\t"),
            [2, 4],
        ),
        ("t.json", json.dumps(ROWS), [1, 2]),
        ("t.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n", [1, 2]),
        ("t.csv", b"\xef\xbb\xbf" + CSV.encode(), [2, 4]),
        ("t.csv", CSV.encode("utf-16"), [2, 4]),
    ],
)
def test_every_form_gives_the_same_rows(
    tmp_path: Path, name: str, content: str | bytes, numbers: list[int]
) -> None:
    rows = read_table(written(tmp_path, name, content))
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.number for row in rows] == numbers


@pytest.mark.parametrize("text", [CSV, json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))])
def test_standard_input_is_told_by_how_it_begins(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert [dict(row.values) for row in read_table("-")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "  \n", "is empty"),
        ("t.csv", "a,b\n", "no rows"),
        ("t.json", "[]", "no rows"),
        (
            "t.csv",
            "a,b\nx,caf\xe9\n".encode("latin-1"),
            r"line 2 holds the byte 0xE9 .* save the file as UTF-8",
        ),
        ("t.csv", 'a,b\nx,1\n"open,2\n', "begins on line 3 .* breaks CSV's rules"),
        ("t.csv", 'a,b\n"x"y,2\n', "begins on line 2 .* breaks CSV's rules"),
        ("t.csv", "a,b\nx,1,2\n", "Line 2 .* has 3 fields, its head 2"),
        ("t.csv", "a,a\nx,1\n", "names a twice"),
        ("t.json", '{"a": 1}', "should hold a list of objects"),
        ("t.json", "[1]", "Row 1 .* should be an object"),
        ("t.json", "[{]", r"line 1, column 3"),
        ("t.jsonl", '{"a": 1}\n{"a"}\n', "Line 2 .* is not valid JSON"),
        ("t.xlsx", "x", r"none of \.csv"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    with pytest.raises(SphereError, match=says):
        read_table(written(tmp_path, name, content))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SphereError, match="No table of facts"):
        read_table(tmp_path / "none.csv")


def test_many_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "a,b\n" + "x,y\n" * 200_000)
    rows = read_table(path)
    assert len(rows) == 200_000
    assert rows[-1].number == 200_001
