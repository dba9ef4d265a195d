"""The figures of a report: each function takes runs and gives a figure, or None where nothing can be drawn.

Knows `RunData` and how the numbers are to be read. Knows nothing of files or pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sphere.evaluation.summary import THIRDS
from sphere.report.collect import Histogram, RunData
from sphere.report.style import GREY, WIDTH, Style, grid, label_axes, legend, styles

EDITS = "Number of edits"
OUTERMOST = 1e-4  # share of the pairs of neurons that a histogram leaves out, as a few outliers would squeeze the rest
MOST_BANDS = 4  # runs above which bands would cover each other
SCORE_PARTS = {
    "counterfact": {
        "score": "Score",
        "efficacy_success": "Efficacy success",
        "paraphrase_success": "Paraphrase success",
        "neighborhood_success": "Neighborhood success",
    },
    "zsre": {
        "score": "Score",
        "efficacy_accuracy": "Efficacy accuracy",
        "paraphrase_accuracy": "Paraphrase accuracy",
        "neighborhood_accuracy_given_answer": "Neighborhood accuracy (given answer)",
    },
}
TASK_NAMES = {
    "reasoning": "Reasoning",
    "nli": "NLI",
    "open_domain_qa": "Open-domain QA",
    "closed_domain_qa": "Closed-domain QA",
}


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


def draw(runs: Sequence[RunData]) -> list[Drawn]:
    """All figures that these runs have the numbers for, in the order of reading."""
    look = dict(zip((r.label for r in runs), styles([(r.method, r.has_sphere) for r in runs]), strict=True))
    drawn: list[Drawn | None] = [energy_change(runs, look)]
    kinds = sorted({run.kind for run in runs if run.kind})
    for draw_one in (score, energy_against_score, retention):
        for kind in kinds:
            chosen = [run for run in runs if run.kind == kind]
            drawn.append(draw_one(chosen, look, "" if len(kinds) == 1 else f" ({kind})"))
    drawn += [cosines(runs, look), downstream(runs, look), principal_share(runs, look)]
    return [figure for figure in drawn if figure]


def energy_change(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Relative change of the energy against the number of edits; mean and range over the edited weights."""
    shown = [run for run in runs if run.energy_changes]
    if not shown:
        return None
    factor, unit = change_unit(shown)
    figure, (axes,) = grid(1, 1, 3.6)
    for run in shown:
        x = [0, *run.energy_changes]
        columns = [[0.0], *(list(changes.values()) for changes in run.energy_changes.values())]
        mean = [factor * fmean(column) for column in columns]
        low, high = ([factor * end(column) for column in columns] for end in (min, max))
        _line(axes, x, mean, run, look)
        if len(shown) <= MOST_BANDS:
            axes.fill_between(x, low, high, color=look[run.label].color, alpha=0.12, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    label_axes(axes, EDITS, f"Change of hyperspherical energy ({unit})")
    legend(figure)
    caption = (
        "Hyperspherical energy of each edited weight's neurons, relative to the unedited weight. Lines: mean over the "
        "edited weights; bands (with up to four runs): their smallest and largest change. Close to zero is what SPHERE "
        "aims at; ppm are parts per million."
    )
    return Drawn("energy_change", "Energy change against number of edits", caption, figure)


def change_unit(runs: Sequence[RunData]) -> tuple[float, str]:
    """Factor and unit in which the energy changes of these runs are readable: percent, or parts per million."""
    largest = max(abs(c) for run in runs for changes in run.energy_changes.values() for c in changes.values())
    return (100.0, "%") if largest >= 1e-4 else (1e6, "ppm")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], run: RunData, look: dict[str, Style]) -> None:
    """A run's line; markers thinned out to about a dozen."""
    axes.plot(x, y, label=run.label, markevery=max(1, len(x) // 12), **look[run.label].line)


def score(runs: Sequence[RunData], look: dict[str, Style], suffix: str) -> Drawn | None:
    """Score and its three parts against the number of edits, with their bootstrap intervals."""
    parts = {
        key: name
        for key, name in SCORE_PARTS[runs[0].kind or ""].items()
        if any(row["metrics"].get(key) for run in runs for row in run.scored)
    }
    if not parts:
        return None
    figure, panels = grid(len(parts), 2, 2.7)
    for axes, (key, name) in zip(panels, parts.items(), strict=True):
        for position, run in enumerate(runs):
            rows = [row for row in run.scored if row["metrics"].get(key)]
            x = [row["n_edits"] for row in rows]
            _intervals(axes, x, [row["metrics"][key] for row in rows], run, look, position, len(runs))
        axes.margins(x=0.06, y=0.08)
        axes.set_title(name)
        label_axes(axes, EDITS, "%")
        axes.set_ylim(*_percent_limits(axes))
    legend(figure)
    caption = (
        "Each checkpoint scored on all facts edited up to it. The score is the harmonic mean of the other three. Bars: "
        "95 % bootstrap interval over the facts (it says nothing of other seeds or other orders of editing). Points of "
        "one checkpoint are drawn beside each other where they would overlap."
    )
    return Drawn(f"score{_slug(suffix)}", f"Editing score against number of edits{suffix}", caption, figure)


def _value(entry: dict[str, Any]) -> float:
    return float(entry["value"] if "value" in entry else entry["mean"])


def _intervals(
    axes: Axes,
    x: Sequence[float],
    entries: Sequence[dict[str, Any]],
    run: RunData,
    look: dict[str, Style],
    position: int,
    count: int,
    span: float | None = None,
) -> None:
    """A line with error bars, moved aside by the run's position among `count` so that bars stay apart."""
    if not entries:
        return
    y = np.array([_value(entry) for entry in entries])
    low = np.array([entry["low"] for entry in entries])
    high = np.array([entry["high"] for entry in entries])
    gap = min((b - a for a, b in pairwise(x)), default=max(x) or 1)
    spread = min(0.5 * gap, 0.012 * count * (max(x) or 1)) if span is None else span  # of all runs together
    shifted = np.array(x, dtype=float) + ((position + 0.5) / count - 0.5) * spread
    axes.errorbar(
        shifted,
        y,
        yerr=np.clip([y - low, high - y], 0, None),
        label=run.label,
        elinewidth=1.0,
        capsize=2.0,
        **look[run.label].line,
    )


def _percent_limits(axes: Axes) -> tuple[float, float]:
    """The drawn range in steps of 10, at most 0 to 100 with room for a marker at either end."""
    low, high = axes.get_ylim()
    low, high = max(10 * np.floor(low / 10), 0), min(10 * np.ceil(high / 10), 100)
    return float(low - 2 * (low == 0)), float(high + 2 * (high == 100))


def _slug(suffix: str) -> str:
    return suffix.strip(" ()").replace(" ", "_") and "_" + suffix.strip(" ()").replace(" ", "_")


def score_points(run: RunData) -> list[tuple[float, float]]:
    """(size of the mean relative energy change, score in percent) of each scored checkpoint whose energy is known."""
    points = []
    for row in run.scored:
        changes, entry = run.energy_changes.get(row["n_edits"]), row["metrics"]["score"]
        if changes and entry:
            points.append((abs(fmean(changes.values())), _value(entry)))
    return points


def energy_against_score(runs: Sequence[RunData], look: dict[str, Style], suffix: str) -> Drawn | None:
    """Each checkpoint as a point: size of its energy change, and score."""
    runs = [run for run in runs if score_points(run)]
    if not runs:
        return None
    factor, unit = change_unit(runs)
    figure, (axes,) = grid(1, 1, 3.6)
    for run in runs:
        x, y = zip(*score_points(run), strict=True)
        scaled = [factor * change for change in x]
        axes.plot(scaled, y, label=run.label, **look[run.label].line | {"linestyle": "none"})
    axes.margins(0.06)
    label_axes(axes, f"Size of the energy change ({unit})", "Score (%)", whole_x=False)
    legend(figure)
    caption = (
        "One point per checkpoint: mean over the edited weights of the relative change of the energy, without its "
        "sign, and the score. The table gives Spearman's rank correlation."
    )
    name, title = f"energy_against_score{_slug(suffix)}", f"Energy change against score{suffix}"
    return Drawn(name, title, caption, figure)


def retention(runs: Sequence[RunData], look: dict[str, Style], suffix: str) -> Drawn | None:
    """Score of the last checkpoint by when a fact was edited."""
    shown = [run for run in runs if any(third.get("score") for third in _last_thirds(run).values())]
    if not shown:
        return None
    figure, (axes,) = grid(1, 1, 3.4)
    for position, run in enumerate(shown):
        thirds = _last_thirds(run)
        x = [i for i, name in enumerate(THIRDS) if thirds.get(name, {}).get("score")]
        entries = [thirds[THIRDS[i]]["score"] for i in x]
        _intervals(axes, x, entries, run, look, position, len(shown), span=min(0.07 * len(shown), 0.5))
    label_axes(axes, "When the fact was edited", "Score after all edits (%)")
    axes.set_xticks(range(len(THIRDS)), [f"{name} third" for name in THIRDS])
    axes.set_ylim(*_percent_limits(axes))
    legend(figure)
    caption = (
        "The last checkpoint's score, split by when a fact was edited: a first third below the last one is forgetting. "
        "Bars: 95 % bootstrap interval over the facts."
    )
    title = f"Retention: score after all edits by time of editing{suffix}"
    return Drawn(f"retention{_slug(suffix)}", title, caption, figure)


def _last_thirds(run: RunData) -> dict[str, Any]:
    return run.scored[-1].get("retention", {}) if run.scored else {}


def cosines(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Density of the cosine of pairs of neurons before and after all edits, and the difference of the two."""
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
        "Cosine similarity of all pairs of neurons, of all edited weights together, before editing and after the last "
        "edit (above, logarithmic), and what editing changed (below). Wider tails mean that neurons crowd. The "
        "outermost 1 in 10,000 pairs are not shown."
    )
    return Drawn("cosines", "Neuron cosines before and after", caption, figure)


def _cosine_panels(above: Axes, below: Axes, runs: Sequence[RunData], look: dict[str, Style]) -> None:
    before = runs[0].cosines[0]
    histograms = [before, *(run.cosines[run.n_edits] for run in runs)]
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


def downstream(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Accuracy of each downstream task against the number of edits."""
    tasks = list(dict.fromkeys(task for run in runs for _, scores in task_rows(run) for task in scores))
    if not tasks:
        return None
    figure, panels = grid(len(tasks), 2, 2.7)
    for axes, task in zip(panels, tasks, strict=True):
        for position, run in enumerate(runs):
            rows = [(n, scores[task]) for n, scores in task_rows(run) if task in scores]
            entries = [
                {"mean": 100 * s["accuracy"], "low": 100 * s["accuracy_interval"][0],
                 "high": 100 * s["accuracy_interval"][1]}
                for _, s in rows
            ]  # fmt: skip
            _intervals(axes, [n for n, _ in rows], entries, run, look, position, len(runs))
        axes.set_title(TASK_NAMES.get(task, task))
        label_axes(axes, EDITS, "Accuracy (%)")
        axes.set_ylim(*_percent_limits(axes))
    legend(figure)
    caption = (
        "Accuracy on reasoning (GSM8K with the worked solution as a hint), NLI (RTE), open-domain QA (Natural "
        "Questions with a passage; a soft exact match is correct) and closed-domain QA (BoolQ). 0 edits is the "
        "unedited model. Bars: Wilson 95 % interval."
    )
    return Drawn("downstream", "Downstream accuracy against number of edits", caption, figure)


def task_rows(run: RunData) -> list[tuple[int, dict[str, Any]]]:
    """(number of edits, task -> metrics) in order; tasks without an accuracy are left out."""
    entries: Iterable[dict[str, Any]] = run.downstream["checkpoints"].values() if run.downstream else ()
    rows = [
        (entry["n_edits"], {t: s for t, s in entry.get("tasks", {}).items() if s.get("accuracy_interval")})
        for entry in entries
    ]
    return sorted((row for row in rows if row[1]), key=lambda row: row[0])


def principal_share(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """Share of each batch's update in the principal directions: as written, and before the hook."""
    shown = [run for run in runs if share_rows(run)]
    if not shown:
        return None
    figure, (axes,) = grid(1, 1, 3.6)
    for run in shown:
        rows = share_rows(run)
        x = [n for n, _, _ in rows]
        _line(axes, x, [100 * after for _, _, after in rows], run, look)
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
