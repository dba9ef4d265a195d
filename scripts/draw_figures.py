"""Draw the figures of the documentation from its own tables.

    python -m scripts.draw_figures

reads the table "MEMIT, 1000 facts in small batches" of docs/results.md and writes docs/figures/memit_1000.svg.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sphere.errors import SphereError
from sphere.files import atomic_path
from sphere.report.style import GREY, drawing, grid, label_axes, styles

DOCS = Path(__file__).parents[1] / "docs"
HEADING = "## MEMIT, 1000 facts in small batches"
METHODS = ("MEMIT", "MEMIT + SPHERE")
SCORE = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\]")
APART = 8  # edits between the points of two methods, so that their intervals can be told apart

Point = tuple[int, float, float, float]  # edits, score, low, high


def scores(page: str) -> dict[str, list[Point]]:
    """weights -> their points, of the table under HEADING.

    Raises:
        SphereError: a table without the rows that are drawn.
    """
    section = page.partition(HEADING)[2].partition("\n## ")[0]
    found: dict[str, list[Point]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and (match := SCORE.fullmatch(cells[5])):
            value, low, high = map(float, match.groups())
            found.setdefault(cells[0], []).append((int(cells[1]), value, low, high))
    if missing := {"unedited", *METHODS} - found.keys():
        raise SphereError(
            f"'{HEADING}' of docs/results.md has no rows of {', '.join(sorted(missing))}: add them."
        )
    return found


def draw(points: dict[str, list[Point]], path: Path) -> None:
    """Scores with their intervals over the number of edits."""
    with drawing():
        figure, (axes,) = grid(1, 1, 2.9)
        unedited = points["unedited"][0][1]
        kinds = styles([("MEMIT", name.endswith("SPHERE")) for name in METHODS])
        for place, (name, style) in enumerate(zip(METHODS, kinds, strict=True)):
            edits = [edit + APART * (place - 0.5) for edit, *_ in points[name]]
            values = [value for _, value, _, _ in points[name]]
            errors = [
                [v - low for _, v, low, _ in points[name]],
                [high - v for _, v, _, high in points[name]],
            ]
            axes.errorbar(edits, values, errors, label=name, capsize=3, **style.line)
        label_axes(axes, "edits", "score (95 % interval)")
        axes.set_xticks([edits for edits, *_ in points["MEMIT"]])
        axes.set_title(f"1000 CounterFact facts, SmolLM2-135M (unedited: {unedited:g})", color=GREY)
        axes.legend()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """Read, draw, say where."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    path = DOCS / "figures" / "memit_1000.svg"
    try:
        draw(scores((DOCS / "results.md").read_text("utf-8")), path)
    except SphereError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Figure: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
