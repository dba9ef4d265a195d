"""The figure of a comparison: each configuration's score, and its difference to the reference, with their intervals.

Knows matplotlib and the boards of `sphere.report.comparison`. Knows nothing of runs or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from sphere.report.comparison import Board, file_suffix, suffix_of
from sphere.report.lines import Drawn, value
from sphere.report.style import GREY, PALETTE, grid

ROW = 0.27  # inches of a configuration


def comparison_figure(board: Board, boards: Sequence[Board]) -> Drawn | None:
    """One line per configuration; None where no score is known.

    Args:
        boards: all of the report, among which this one has its name.
    """
    scores = {c["label"]: score for c in board["configurations"] if (score := c["metrics"].get("score"))}
    if not scores:
        return None
    shown, pairs = list(scores), board["differences"]
    reference = pairs[0]["reference"]["label"] if pairs else None
    rows = {p["run"]["label"]: p["differences"][-1] for p in pairs if p["reference"]["label"] == reference}
    differences = {label: row["score"] for label, row in rows.items() if "score" in row}
    figure, panels = grid(2 if differences else 1, 2, 1.0 + ROW * len(shown))
    _dots(panels[0], scores, shown)
    panels[0].set_title("Score (%)")
    if unedited := (board["unedited"] or {"metrics": {}})["metrics"].get("score"):
        panels[0].axvline(value(unedited), color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    if differences:
        _dots(panels[1], differences, shown)
        panels[1].axvline(0, color=GREY, linewidth=0.8)
        panels[1].set_title("Difference to the reference")
        panels[1].tick_params(labelleft=False)
    beside = (
        f", and paired differences to {reference} over the same facts and seeds in percentage points (right)"
    )
    caption = (
        "Scores at the last checkpoint that is scored for all seeds, mean over facts and seeds (dotted: the unedited "
        "model)"
        f"{beside if differences else ''}. Bars: 95 % bootstrap intervals over facts and, where there are several, "
        "seeds."
    )
    title = f"Configurations compared{suffix_of(board, boards)}"
    return Drawn(f"comparison{file_suffix(board, boards)}", title, caption, figure)


def _dots(axes: Axes, entries: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> None:
    """A dot with its interval for each label that has an entry, the first on top."""
    for position, label in enumerate(order):
        if label in entries:
            entry = dict(entries[label])
            middle = value(entry)
            ends = [[max(middle - entry["low"], 0)], [max(entry["high"] - middle, 0)]]
            axes.errorbar(
                [middle], [position], xerr=ends, color=PALETTE[0], marker="o", elinewidth=1.0, capsize=2.0
            )
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
