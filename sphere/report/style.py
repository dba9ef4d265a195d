"""How figures look: colours that colour-blind readers can tell apart, markers and line styles beside them.

Knows matplotlib. Knows nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

# Okabe & Ito (2008), without the yellow, which is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
WIDTH = 7.2  # inches
LEGEND_ROW = 0.19  # inches
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "savefig.facecolor": "white",
    "svg.hashsalt": "sphere",  # the same figure is the same file
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Style:
    """How one run is drawn everywhere."""

    color: str
    marker: str
    dashed: bool

    @property
    def line(self) -> dict[str, Any]:
        """Keywords of `Axes.plot`: solid with filled markers, or dashed with hollow ones."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": (0, (4, 2)) if self.dashed else "-",
            "markerfacecolor": "white" if self.dashed else self.color,
        }


def styles(kinds: Sequence[tuple[str, bool]]) -> list[Style]:
    """A style per run from its (method, with SPHERE or not).

    A method with and without SPHERE shares colour and marker, solid and dashed; where one of the two occurs again, it
    has a colour of its own.
    """
    numbers: dict[tuple[str, int], int] = {}
    result = []
    for index, (method, has_sphere) in enumerate(kinds):
        number = numbers.setdefault((method, kinds[:index].count((method, has_sphere))), len(numbers))
        turn = number // len(PALETTE)  # the second time round, other markers go with the colours
        marker = MARKERS[(number + turn) % len(MARKERS)]
        result.append(Style(PALETTE[number % len(PALETTE)], marker, not has_sphere))
    return result


@contextmanager
def drawing() -> Iterator[None]:
    """Figures made and saved inside look as this module says."""
    with matplotlib.rc_context(SETTINGS):
        yield


def grid(panels: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes in rows of `columns`; `height` of a row in inches, the legend not counted."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, hspace=0.04)
    figure = Figure(figsize=(WIDTH, rows * height + 0.2), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in axes[panels:]:
        empty.set_axis_off()
    return figure, list(axes[:panels])


def label_axes(axes: Axes, x: str, y: str, whole_x: bool = True) -> None:
    """Axis labels, with few ticks; whole numbers along x."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_x, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.ticklabel_format(axis="both", useOffset=False, style="plain")


def legend(figure: Figure) -> None:
    """One legend below all panels, in as few rows as the labels allow; the figure grows by it. Call it last."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True)) | unique
    if not unique:
        return
    longest = max(len(name) for name in unique)
    most = max(1, min(len(unique), int(90 / (longest + 8))))
    rows = -(-len(unique) // most)
    columns = -(-len(unique) // rows)  # as many rows as with `most`, evenly filled
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows)
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        handlelength=2.6,
        columnspacing=1.4,
    )
