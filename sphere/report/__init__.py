"""Figures and one self-contained HTML page that compare any number of runs.

    <out>/report/report.html             the page, with its figures inside
    <out>/report/tables.md               its tables as Markdown, for a page or a paper of one's own
    <out>/report/paired.json             differences between runs that edited the same facts in the same order
    <out>/report/comparison.json         configurations beside one another, whatever their seed
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
from sphere.report.comparison import UNITS as COMPARED_UNITS
from sphere.report.comparison import boards, comparison_text
from sphere.report.comparison_figure import comparison_figure
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
COMPARISON_NAME = "comparison.json"
TABLES_NAME = "tables.md"
FIGURES = "figures"


def make_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    progress: bool = True,
    against: str | Path | None = None,
    reference: str | None = None,
) -> Path:
    """Make the report of these runs.

    Args:
        folders: runs, in the order of showing.
        out: the report goes to `<out>/report`; None for the first run's folder.
        against: a run that all others are compared with fact by fact (it is shown, too); None: the runs that differ in
            the hook and the rules only are compared with the plain one among them.
        reference: label of the configuration that the comparison over seeds has the differences to; None: the first.

    Returns:
        The page.

    Raises:
        SphereError: a folder without checkpoints or scores, an unreadable file, a run that cannot be compared with
            `against`, no configuration that is called `reference`, or no room to write.
    """
    compared_with = None if against is None else Path(against)
    runs = load_runs([*folders, *([compared_with] if compared_with else [])])
    pairs = compare(runs, compared_with)
    compared = boards(runs, reference)
    measure(runs, progress)
    place = (Path(out) if out is not None else runs[0].folder) / FOLDER
    command = [*PROGRAM, "report", "--weight_folder", *(str(run.folder) for run in runs)]
    for flag, value in (("--against", against), ("--reference", reference), ("--out", out)):
        command += [flag, str(value)] if value else []
    with drawing():
        drawn_boards = [figure for board in compared if (figure := comparison_figure(board, compared))]
        figures = [(drawn, svg(drawn)) for drawn in (*drawn_boards, *draw(runs, pairs))]
        made = tables(runs, pairs, compared)
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
        write_json(place / COMPARISON_NAME, {"units": COMPARED_UNITS, "boards": compared})
        with atomic_path(place / TABLES_NAME) as temporary:
            temporary.write_text("\n".join(map(markdown, made)), "utf-8")
        with atomic_path(place / PAGE_NAME) as temporary:
            temporary.write_text(page, "utf-8")
    return place / PAGE_NAME


def report_text(page: str | Path) -> str:
    """The comparisons of a report for the terminal; "" where no runs could be compared.

    Configurations over their seeds; and where there is but one seed, runs pair by pair at every checkpoint.

    Args:
        page: as `make_report` returns it.
    """
    place = Path(page).parent
    compared = read_json(place / COMPARISON_NAME, "comparison")["boards"]
    several = any(len(one["folders"]) > 1 for board in compared for one in board["configurations"])
    pairs = [] if several else read_json(place / PAIRED_NAME, "paired differences")["pairs"]
    made = [format_lines(paired_lines(pairs, kind)) for kind in sorted({pair["kind"] for pair in pairs})]
    paired = ["Paired differences in percentage points, 95 % intervals:", *made] if made else []
    return "\n\n".join(filter(None, [comparison_text(compared), *paired]))


__all__ = ["make_report", "report_text"]
