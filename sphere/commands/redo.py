"""Put edits that were undone back into a run's weights, and measure what that does.

    sphere redo RUN --batch 2
    sphere redo RUN --case 17 23
    sphere redo RUN --all

The counterpart of `sphere undo`. With nothing undone any more, the weights are those that were edited, bit for bit.
"""

from __future__ import annotations

import argparse

from sphere.commands import undo


def parser() -> argparse.ArgumentParser:
    """The flags."""
    return undo.parser(__doc__, "redo")


def main(argv: list[str] | None = None) -> int:
    """Parse, redo, print."""
    return undo.change_and_tell("redo", parser().parse_args(argv))
