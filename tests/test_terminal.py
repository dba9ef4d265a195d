"""Pictures in a terminal: whole, and only where the terminal can show them."""

from __future__ import annotations

import base64
import io
import re

import pytest

from sphere.report.terminal import CHUNK, picture, show

PNG = b"\x89PNG" + bytes(range(256)) * 40  # several of kitty's chunks


def test_iterm_gets_one_sequence():
    found = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);width=80%:(.+)\a\n", picture(PNG, {"TERM_PROGRAM": "WezTerm"})
    )
    assert found
    assert int(found[1]) == len(PNG)
    assert base64.b64decode(found[2]) == PNG


def test_kitty_gets_chunks_of_which_the_last_says_so():
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", picture(PNG, {"TERM": "xterm-kitty"}))
    assert len(parts) > 2
    assert all(len(data) <= CHUNK for _, data in parts)
    assert base64.b64decode("".join(data for _, data in parts)) == PNG
    assert [head[-3:] for head, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]
    assert [head.startswith("a=T,f=100") for head, _ in parts] == [True] + [False] * (len(parts) - 1)


@pytest.mark.parametrize(
    ("environment", "is_terminal"), [({"TERM": "xterm"}, True), ({"TERM": "xterm-kitty"}, False), ({}, True)]
)
def test_nothing_is_written_elsewhere(environment, is_terminal, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    show(PNG, stream, environment)
    assert stream.getvalue() == ""
