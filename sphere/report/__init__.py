"""Figures and one self-contained HTML page that compare any number of runs.

    <out>/report/report.html             the page, with its figures inside
    <out>/report/figures/<name>.svg      each figure, also as .png

Reads what the editing and the scoring commands have left in the runs' folders; loads no model.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from sphere.files import atomic_path
from sphere.lock import locked
from sphere.report.collect import load_runs, measure
from sphere.report.figures import draw
from sphere.report.page import png, render, svg
from sphere.report.style import drawing
from sphere.report.tables import tables
from sphere.runs.config import PROGRAM
from sphere.runs.folder import RUN_FILE

FOLDER = "report"
PAGE_NAME = "report.html"
FIGURES = "figures"


def make_report(folders: Sequence[str | Path], out: str | Path | None = None, progress: bool = True) -> Path:
    """Make the report of these runs.

    Args:
        folders: runs, in the order of showing.
        out: the report goes to `<out>/report`; None for the first run's folder.

    Returns:
        The page.

    Raises:
        SphereError: a folder without checkpoints, an unreadable file, or no room to write.
    """
    runs = load_runs(folders)
    measure(runs, progress)
    place = (Path(out) if out is not None else runs[0].folder) / FOLDER
    command = [*PROGRAM, "report", "--weight_folder", *(str(run.folder) for run in runs)]
    with drawing():
        figures = [(drawn, svg(drawn)) for drawn in draw(runs)]
        page = render(
            runs, figures, tables(runs), shlex.join([*command, *(["--out", str(out)] if out else [])])
        )
        files = {f"{drawn.name}.svg": image for drawn, image in figures}
        files |= {f"{drawn.name}.png": png(drawn) for drawn, _ in figures}
    with locked(place):
        for old in place.glob(f"{FIGURES}/*"):
            if old.name not in files and RUN_FILE.fullmatch(f"{FOLDER}/{FIGURES}/{old.name}"):
                old.unlink()  # of an earlier report, with other parts
        for name, content in files.items():
            with atomic_path(place / FIGURES / name) as temporary:
                temporary.write_bytes(content)
        with atomic_path(place / PAGE_NAME) as temporary:
            temporary.write_text(page, "utf-8")
    return place / PAGE_NAME


__all__ = ["make_report"]
