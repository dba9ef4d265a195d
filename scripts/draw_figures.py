"""Draw the figures of the documentation from its own tables.

    python -m scripts.draw_figures

reads the tables "score after edits" of docs/results.md and writes sequential.svg and stress.svg in docs/figures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from sphere.errors import SphereError
from sphere.files import atomic_path
from sphere.report.style import Style, drawing, grid, label_axes, legend, styles

DOCS = Path(__file__).parents[1] / "docs"
FIRST = "score after edits"  # head of the first column
SCORE = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\]")

Point = tuple[int, float, float, float]  # edits, score, low, high


@dataclass(frozen=True)
class Drawing:
    """A figure of one table.

    Attributes:
        heading: above the table.
        panels: the rows of each panel, by name; the panel is called as its first row.
        kinds: what decides the style of each name: colour by the first, dashed without the second.
    """

    name: str
    heading: str
    panels: Sequence[Sequence[str]]
    kinds: dict[str, tuple[str, bool]]
    columns: int = 2
    height: float = 2.3


def _pair(method: str) -> tuple[str, str]:
    return method, f"{method} + SPHERE"


METHODS = ("MEMIT", "RECT", "PRUNE", "AlphaEdit")
STRESSED = (
    *_pair("MEMIT"),
    "MEMIT + SPHERE, original directions",
    "MEMIT + REVIVE",
    "MEMIT + random directions",
)
DRAWINGS = (
    Drawing(
        "sequential",
        "## 1000 facts, shipped settings",
        [_pair(method) for method in METHODS],
        {name: (method, "SPHERE" in name) for method in METHODS for name in _pair(method)},
    ),
    Drawing(
        "stress",
        "## A stress test: which part of SPHERE does it",
        [STRESSED],
        {name: (name.removesuffix(" + SPHERE"), name != "MEMIT") for name in STRESSED},
        height=3.2,
    ),
)


def scores(page: str, heading: str, names: Sequence[str]) -> dict[str, list[Point]]:
    """weights -> their points, of the table "score after edits" under a heading.

    Raises:
        SphereError: a table without these rows.
    """
    section = page.partition(f"{heading}\n")[2].partition("\n## ")[0]
    found: dict[str, list[Point]] = {}
    edits: list[int] = []
    for line in section.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if first == FIRST:
            edits = [int(cell) for cell in cells]
        matches = [SCORE.fullmatch(cell) for cell in cells]
        if edits and first not in found and len(matches) == len(edits) and all(matches):
            found[first] = [
                (n, *map(float, match.groups()))  # type: ignore[misc]
                for n, match in zip(edits, matches, strict=True)
                if match
            ]
    if missing := set(names) - found.keys():
        raise SphereError(
            f"'{heading}' of docs/results.md has no rows of {', '.join(sorted(missing))}: add them."
        )
    return found


def draw(drawn: Drawing, page: str, path: Path) -> None:
    """Scores with their intervals over the number of edits."""
    names = [name for panel in drawn.panels for name in panel]
    points = scores(page, drawn.heading, names)
    looks = dict(zip(names, styles([drawn.kinds[name] for name in names]), strict=True))
    with drawing():
        figure, panels = grid(len(drawn.panels), drawn.columns, drawn.height)
        for axes, chosen in zip(panels, drawn.panels, strict=True):
            for name in chosen:
                _line(axes, points[name], looks[name], name)
            label_axes(axes, "edits", "score")
            axes.set_ylim(45, 90)
        legend(figure)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _line(axes: Axes, points: Sequence[Point], style: Style, name: str) -> None:
    edits, values, low, high = zip(*points, strict=True)
    axes.plot(edits, values, label=name, **style.line)
    axes.fill_between(edits, low, high, color=style.color, alpha=0.15, linewidth=0)


def main(argv: list[str] | None = None) -> int:
    """Read, draw, say where."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    page = (DOCS / "results.md").read_text("utf-8")
    try:
        for drawn in DRAWINGS:
            path = DOCS / "figures" / f"{drawn.name}.svg"
            draw(drawn, page, path)
            print(f"Figure: {path}")
    except SphereError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
