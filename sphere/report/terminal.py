"""Pictures in a terminal that can show them, by the protocols of iTerm2 (WezTerm, Konsole) and of kitty (Ghostty).

Knows escape sequences. Knows nothing of figures.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TextIO

INLINE = ("iTerm.app", "WezTerm", "vscode")  # TERM_PROGRAM of those that know iTerm2's sequence
CHUNK = 4096  # bytes of base64 in one sequence of kitty's


def picture(png: bytes, environment: Mapping[str, str]) -> str:
    """What shows a PNG image in the terminal that the environment tells of; "" where it cannot show one."""
    data = base64.b64encode(png).decode("ascii")
    if environment.get("TERM_PROGRAM") in INLINE or environment.get("KONSOLE_VERSION"):
        return f"\x1b]1337;File=inline=1;size={len(png)};width=80%:{data}\a\n"
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
        last = len(parts) - 1
        heads = [("a=T,f=100," if i == 0 else "") + f"m={int(i < last)}" for i in range(len(parts))]
        return "".join(f"\x1b_G{head};{part}\x1b\\" for head, part in zip(heads, parts, strict=True)) + "\n"
    return ""


def show(png: bytes, stream: TextIO, environment: Mapping[str, str]) -> None:
    """Show a PNG image where the stream is a terminal that can; else do nothing."""
    if stream.isatty() and (text := picture(png, environment)):
        stream.write(text)
        stream.flush()
