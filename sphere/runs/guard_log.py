"""What a run's guard saw, in the run's folder.

    <folder>/guard.jsonl    one line per batch that was looked at:
        batch, n_edits      the batch (from 0) and the edits written with it
        values              what was seen: `sphere.evaluation.watch`
        unedited            the same of the unedited model, as far as it has it
        moved               how far that is, by the names of `sphere.runs.guard_limits`
        limits              those in force
        passed              names of what went beyond its limit: this batch was not kept
        seconds             of the look
        edit_seconds        of the batch

Infinite numbers, of a broken model and of limits that are none, are null. Knows files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphere.errors import SphereError
from sphere.files import atomic_path

GUARD_NAME = "guard.jsonl"


def read_guard(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's guard.jsonl, in order, [] where there is none; a last line that a kill has cut is left out.

    Raises:
        SphereError: any other line that is not a guard's.
    """
    path = folder / GUARD_NAME
    texts = path.read_text("utf-8").split("\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines.append({"n_edits": int(line["n_edits"]), "moved": dict(line["moved"]), **line})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(texts):
                raise SphereError(
                    f"Line {number} of {path} is not what a guard writes: correct or remove it."
                ) from error
    return lines


def forget_later(folder: Path, n_edits: int) -> None:
    """Remove the lines of batches beyond so many edits: they are edited anew."""
    path = folder / GUARD_NAME
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_guard(folder) if line["n_edits"] <= n_edits]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), "utf-8")
