"""Figures of what editing did to the weights and to the model as a whole; see `sphere.report.figures`.

Knows `RunData` and how the numbers are to be read. Knows nothing of files or pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sphere.report.collect import Histogram, RunData
from sphere.report.lines import EDITS, MOST_BANDS, Drawn, line
from sphere.report.style import GREY, WIDTH, Style, grid, label_axes, legend

OUTERMOST = 1e-4  # share of the pairs of neurons that a histogram leaves out, as a few outliers would squeeze the rest


def energy_change(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Relative change of the energy against the number of edits; mean and range over the edited weights."""
    shown = [run for run in runs if run.energy_changes]
    if not shown:
        return None
    figure, (axes,) = grid(1, 1, 3.6)
    energy_lines(axes, shown, look)
    legend(figure)
    caption = (
        "Hyperspherical energy of each edited weight's neurons, relative to the unedited weight. Lines: mean over the "
        "edited weights; bands (with up to four runs): their smallest and largest change. Close to zero is what SPHERE "
        "aims at; ppm are parts per million."
    )
    return Drawn("energy_change", "Energy change against number of edits", caption, figure)


def energy_lines(axes: Axes, runs: Sequence[RunData], look: dict[str, Style]) -> None:
    """A line per run, and with few of them the range over the edited weights as a band."""
    factor, unit = change_unit(runs)
    for run in runs:
        x = [0, *run.energy_changes]
        columns = [[0.0], *(list(changes.values()) for changes in run.energy_changes.values())]
        mean = [factor * fmean(column) for column in columns]
        low, high = ([factor * end(column) for column in columns] for end in (min, max))
        line(axes, x, mean, run.label, look[run.label])
        if len(runs) <= MOST_BANDS:
            axes.fill_between(x, low, high, color=look[run.label].color, alpha=0.12, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    label_axes(axes, EDITS, f"Change of hyperspherical energy ({unit})")


def change_unit(runs: Sequence[RunData]) -> tuple[float, str]:
    """Factor and unit in which the energy changes of these runs are readable: percent, or parts per million."""
    largest = max(abs(c) for run in runs for changes in run.energy_changes.values() for c in changes.values())
    return (100.0, "%") if largest >= 1e-4 else (1e6, "ppm")


def whole_model(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Perplexity of the fixed text, rotation of the principal directions and norm of the change, where scored."""
    panels: dict[str, Callable[[dict[str, Any]], list[float]]] = {
        "Perplexity of the fixed text": lambda row: _numbers(row.get("text_perplexity")),
        "Rotation of the principal directions": lambda row: _layers(row, "rotation"),
        "Norm of the change": lambda row: _layers(row, "change_norm"),
    }
    found = {
        name: {run.label: points for run in runs if (points := _points(run, take))}
        for name, take in panels.items()
    }
    found = {name: lines for name, lines in found.items() if lines}
    if not found:
        return None
    figure, axes = grid(len(found), 2, 2.7)
    for panel, (name, lines) in zip(axes, found.items(), strict=True):
        for label, points in lines.items():
            x, columns = list(points), list(points.values())
            line(panel, x, [fmean(column) for column in columns], label, look[label])
            if len(lines) <= MOST_BANDS:
                ends = [min(c) for c in columns], [max(c) for c in columns]
                panel.fill_between(x, *ends, color=look[label].color, alpha=0.12, linewidth=0)
        panel.set_title(name)
        values = [v for points in lines.values() for column in points.values() for v in column]
        label_axes(panel, EDITS, "")
        if min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")
    legend(figure)
    caption = (
        "Perplexity of the shipped text: the cheapest sign that more than the edited facts has changed (0 edits is the "
        "unedited model; a state whose perplexity is not finite has no point). Rotation: mean squared sine of the "
        "angles between the principal directions and those of the unedited weight, at β = 0.5. Norm: Frobenius norm of "
        "the change since then. Lines: mean over the edited weights; bands (with up to four runs): their smallest and "
        "largest."
    )
    return Drawn("whole_model", "The model as a whole against number of edits", caption, figure)


def _points(run: RunData, take: Callable[[dict[str, Any]], list[float]]) -> dict[int, list[float]]:
    """Number of edits -> values of the states that have some; nothing where no edited one does."""
    points = {row["n_edits"]: take(row) for row in run.rows if take(row)}
    return points if any(points) else {}


def _numbers(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _layers(row: dict[str, Any], key: str) -> list[float]:
    if not row["n_edits"] and "weights" in row:
        return [0.0]
    return [layer[key] for layer in (row.get("weights") or {}).get("layers", {}).values()]


def cosines(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Density of the cosine of pairs of neurons before editing and at the last checkpoint, and their difference."""
    shown = [run for run in runs if len(run.cosines) == 2]
    if not shown:
        return None
    groups: dict[tuple[int, ...], list[RunData]] = {}  # runs with the same unedited weights
    for run in shown:
        groups.setdefault(tuple(run.cosines[0]["counts"]), []).append(run)
    height = 4.6 * len(groups)
    figure = Figure(figsize=(WIDTH, height + 0.2), layout="constrained")
    panels = figure.subplots(2 * len(groups), 1, squeeze=False, height_ratios=[3, 2] * len(groups)).ravel()
    for index, group in enumerate(groups.values()):
        _cosine_panels(panels[2 * index], panels[2 * index + 1], group, look)
        if len(groups) > 1:
            panels[2 * index].set_title(group[0].model)
    legend(figure)
    caption = (
        "Cosine similarity of all pairs of neurons, of all edited weights together, before editing and at the last "
        "checkpoint (above, logarithmic), and what editing changed (below). Wider tails mean that neurons crowd. The "
        "outermost 1 in 10,000 pairs are not shown."
    )
    return Drawn("cosines", "Neuron cosines before and after", caption, figure)


def _cosine_panels(above: Axes, below: Axes, runs: Sequence[RunData], look: dict[str, Style]) -> None:
    before = runs[0].cosines[0]
    histograms = [before, *(run.cosines[max(run.cosines)] for run in runs)]
    edges, (first, *others) = densities(histograms)
    middle = (edges[:-1] + edges[1:]) / 2
    for run, density in zip(runs, others, strict=True):
        line = {**look[run.label].line, "marker": None, "linewidth": 1.2}
        above.plot(middle, density, label=run.label, **line)
        below.plot(middle, np.nan_to_num(density) - np.nan_to_num(first), **line)
    above.fill_between(
        edges[:-1], first, step="post", color="#c8c8c8", label="before editing", linewidth=0, zorder=0
    )
    above.set_yscale("log")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    above.yaxis.set_minor_formatter(NullFormatter())
    below.axhline(0, color=GREY, linewidth=0.8)
    above.set_ylabel("Density")
    below.set_ylabel("After − before\n(density)")
    for axes in (above, below):
        axes.set_xlim(edges[0], edges[-1])
    above.tick_params(labelbottom=False)
    below.set_xlabel("Cosine similarity of two neurons")


def densities(histograms: Sequence[Histogram], bins: int = 40) -> tuple[np.ndarray, list[np.ndarray]]:
    """Histograms over common, coarser bins that hold all but the outermost 1 in 10,000 pairs.

    Returns:
        edges (bins + 1), and a density (bins) of each histogram; NaN where there is no pair.
    """
    edges = np.array(histograms[0]["edges"])
    counts = np.array([h["counts"] for h in histograms], dtype=float)
    occupied = np.cumsum(counts.sum(0)) / counts.sum()
    low, high = np.searchsorted(occupied, [OUTERMOST / 2, 1 - OUTERMOST / 2])
    width = max(1, -(-(int(high) - int(low) + 1) // bins))
    low = max(0, int(low) - 1)
    bins = min(bins, (counts.shape[1] - low) // width)
    part = counts[:, low : low + bins * width].reshape(len(histograms), bins, width).sum(2)
    coarse = edges[low : low + bins * width + 1 : width]
    share = part / counts.sum(1, keepdims=True) / np.diff(coarse)
    return coarse, [np.where(row > 0, row, np.nan) for row in share]


def principal_share(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Share of each batch's update in the principal directions: as written, and before the hook."""
    shown = [run for run in runs if share_rows(run)]
    if not shown:
        return None
    figure, (axes,) = grid(1, 1, 3.6)
    for run in shown:
        rows = share_rows(run)
        x = [n for n, _, _ in rows]
        line(axes, x, [100 * after for _, _, after in rows], run.label, look[run.label])
        if run.has_sphere:
            before = [100 * share for _, share, _ in rows]
            axes.plot(
                x, before, color=look[run.label].color, linestyle=":", label=f"{run.label}: before the hook"
            )
    axes.set_ylim(bottom=0)
    label_axes(axes, EDITS, "Share of the update in the\nprincipal directions (%)")
    legend(figure)
    caption = (
        "‖ΔU‖² / ‖Δ‖², the share of each update that lies in the weight's principal directions U, mean over the edited "
        "weights: as written, and (dotted) as the solver found it, before the SPHERE hook. Runs without SPHERE are "
        "measured with the directions of β = 0.5."
    )
    return Drawn("principal_share", "Principal-direction share of updates", caption, figure)


def share_rows(run: RunData) -> list[tuple[int, float, float]]:
    """(number of edits, share before the hook, share as written) of the batches that say it; means over weights."""
    rows = []
    for batch in run.batches:
        layers = [f for f in batch["layers"].values() if "principal_share_after" in f]
        if layers:
            before, after = (
                fmean(f[key] for f in layers) for key in ("principal_share_before", "principal_share_after")
            )
            rows.append((batch["n_edits"], before, after))
    return rows
