"""Figures and one self-contained HTML page that compare any number of runs.

    <out>/report/report.html             the page, with its figures inside
    <out>/report/tables.md               its tables as Markdown, for a page or a paper of one's own
    <out>/report/paired.json             differences between runs that edited the same facts in the same order
    <out>/report/figures/<name>.svg      each figure, also as .png

Reads what the editing and the scoring commands have left in the runs' folders; loads no model.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from sphere.evaluation.summary import format_lines
from sphere.files import atomic_path, read_json, write_json
from sphere.lock import locked
from sphere.report.collect import load_runs, measure
from sphere.report.figures import draw
from sphere.report.page import png, render, svg
from sphere.report.pairs import UNITS, compare, paired_lines
from sphere.report.style import drawing
from sphere.report.tables import markdown, tables
from sphere.runs.config import PROGRAM
from sphere.runs.folder import RUN_FILE

FOLDER = "report"
PAGE_NAME = "report.html"
PAIRED_NAME = "paired.json"
TABLES_NAME = "tables.md"
FIGURES = "figures"


def make_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    progress: bool = True,
    against: str | Path | None = None,
) -> Path:
    """Make the report of these runs.

    Args:
        folders: runs, in the order of showing.
        out: the report goes to `<out>/report`; None for the first run's folder.
        against: a run that all others are compared with fact by fact (it is shown, too); None: the runs that differ in
            the hook and the rules only are compared with the plain one among them.

    Returns:
        The page.

    Raises:
        SphereError: a folder without checkpoints or scores, an unreadable file, a run that cannot be compared with
            `against`, or no room to write.
    """
    compared_with = None if against is None else Path(against)
    runs = load_runs([*folders, *([compared_with] if compared_with else [])])
    pairs = compare(runs, compared_with)
    measure(runs, progress)
    place = (Path(out) if out is not None else runs[0].folder) / FOLDER
    command = [*PROGRAM, "report", "--weight_folder", *(str(run.folder) for run in runs)]
    for flag, value in (("--against", against), ("--out", out)):
        command += [flag, str(value)] if value else []
    with drawing():
        figures = [(drawn, svg(drawn)) for drawn in draw(runs, pairs)]
        made = tables(runs, pairs)
        page = render(runs, figures, made, shlex.join(command))
        files = {f"{drawn.name}.svg": image for drawn, image in figures}
        files |= {f"{drawn.name}.png": png(drawn) for drawn, _ in figures}
    with locked(place):
        for old in place.glob(f"{FIGURES}/*"):
            if old.name not in files and RUN_FILE.fullmatch(f"{FOLDER}/{FIGURES}/{old.name}"):
                old.unlink()  # of an earlier report, with other parts
        for name, content in files.items():
            with atomic_path(place / FIGURES / name) as temporary:
                temporary.write_bytes(content)
        write_json(place / PAIRED_NAME, {"units": UNITS, "pairs": pairs})
        with atomic_path(place / TABLES_NAME) as temporary:
            temporary.write_text("\n".join(map(markdown, made)), "utf-8")
        with atomic_path(place / PAGE_NAME) as temporary:
            temporary.write_text(page, "utf-8")
    return place / PAGE_NAME


def paired_text(page: str | Path) -> str:
    """The paired differences of a report for the terminal, every checkpoint; "" where no runs could be compared.

    Args:
        page: as `make_report` returns it.
    """
    pairs = read_json(Path(page).parent / PAIRED_NAME, "paired differences")["pairs"]
    kinds = sorted({pair["kind"] for pair in pairs})
    made = [format_lines(paired_lines(pairs, kind)) for kind in kinds]
    return "\n\n".join(["Paired differences in percentage points, 95 % intervals:", *made]) if made else ""


__all__ = ["make_report", "paired_text"]
