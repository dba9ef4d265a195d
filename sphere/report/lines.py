"""Lines against the number of edits, with intervals and with what a reader needs beside a figure.

Knows matplotlib and metrics as `sphere.evaluation.summary` makes them. Knows nothing of runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sphere.report.style import Style

EDITS = "Number of edits"
MOST_BANDS = 4  # lines above which bands would cover each other


@dataclass(frozen=True)
class Drawn:
    """A figure with what a reader needs beside it.

    Attributes:
        name: of its files.
        caption: how to read it.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, style: Style) -> None:
    """A line; markers thinned out to about a dozen."""
    axes.plot(x, y, label=label, markevery=max(1, len(x) // 12), **style.line)


def value(entry: dict[str, Any]) -> float:
    """The number that a metric, a score or a difference has its interval around."""
    return float(next(entry[key] for key in ("value", "mean", "difference") if key in entry))


def intervals(
    axes: Axes,
    x: Sequence[float],
    entries: Sequence[dict[str, Any]],
    label: str,
    style: Style,
    position: int,
    count: int,
    span: float | None = None,
) -> None:
    """A line with error bars, moved aside by its position among `count` so that bars stay apart."""
    if not entries:
        return
    y = np.array([value(entry) for entry in entries])
    low = np.array([entry["low"] for entry in entries])
    high = np.array([entry["high"] for entry in entries])
    gap = min((b - a for a, b in pairwise(x)), default=max(x) or 1)
    spread = min(0.5 * gap, 0.012 * count * (max(x) or 1)) if span is None else span  # of all runs together
    shifted = np.array(x, dtype=float) + ((position + 0.5) / count - 0.5) * spread
    axes.errorbar(
        shifted,
        y,
        yerr=np.clip([y - low, high - y], 0, None),
        label=label,
        elinewidth=1.0,
        capsize=2.0,
        **style.line,
    )


def percent_limits(axes: Axes) -> tuple[float, float]:
    """The drawn range in steps of 10, at most 0 to 100 with room for a marker at either end."""
    low, high = axes.get_ylim()
    low, high = max(10 * np.floor(low / 10), 0), min(10 * np.ceil(high / 10), 100)
    return float(low - 2 * (low == 0)), float(high + 2 * (high == 100))


def slug(suffix: str) -> str:
    """The end of a file's name for the end of a title: \" (zsre)\" -> \"_zsre\"."""
    return suffix.strip(" ()").replace(" ", "_") and "_" + suffix.strip(" ()").replace(" ", "_")
