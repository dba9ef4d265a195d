"""The figure of what runs' guards saw; see `sphere.report.figures`.

Knows `RunData` and the names of the limits. Knows nothing of files or pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import NullFormatter

from sphere.report.collect import RunData
from sphere.report.lines import EDITS, Drawn, line
from sphere.report.style import GREY, Style, grid, label_axes, legend

PANELS = {
    "perplexity": "Perplexity of the fixed text\n(multiple of the unedited)",
    "control": "Control answers: lost\nlog-likelihood (nats per token)",
    "edits": "Sampled edits that hold:\nfall from the highest",
    "energy": "Hyperspherical energy:\nlargest relative change",
    "spectrum": "Condition number:\nlargest growth",
}
WIDE = 10.0  # ratio of the largest value to the smallest from which an axis is logarithmic


def guard(runs: Sequence[RunData], look: dict[str, Style]) -> Drawn | None:
    """What each batch moved, by the guard's names, with the limits; None where no run had a guard."""
    shown = [run for run in runs if run.guard]
    names = [n for n in PANELS if any(_points(run, n) for run in shown)]
    if not names:
        return None
    figure, panels = grid(len(names), 2, 2.5)
    for axes, name in zip(panels, names, strict=True):
        values = []
        for run in shown:
            points = _points(run, name)
            line(axes, [n for n, _ in points], [v for _, v in points], run.label, look[run.label])
            values += [v for _, v in points]
        limits = {run.guard[-1]["limits"].get(name) for run in shown} - {None}
        for limit in sorted(limits):
            axes.axhline(limit, color=GREY, linestyle=":", label="limit")
        label_axes(axes, EDITS, PANELS[name])
        if min(values) > 0 and max(values) > WIDE * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
    legend(figure)
    caption = (
        "What the guard saw after each batch (docs/guard.md). Dotted: the limits in force; a batch beyond one was not "
        "kept, and is the last one drawn. "
    )
    return Drawn("guard", "What the guard saw", (caption + " ".join(map(_end, shown))).strip(), figure)


def _points(run: RunData, name: str) -> list[tuple[int, float]]:
    """(edits, value) of the batches in which it was measured."""
    return [
        (look["n_edits"], look["moved"][name]) for look in run.guard if look["moved"].get(name) is not None
    ]


def _end(run: RunData) -> str:
    """How the run ended, where its guard stopped it."""
    last = run.guard[-1]
    if not last["passed"]:
        return f"{run.label} passed."
    beyond = ", ".join(
        f"{name} {_number(last['moved'][name])} (limit {last['limits'][name]:g})" for name in last["passed"]
    )
    return f"{run.label} was stopped before {last['n_edits']} edits: {beyond}."


def _number(value: float | None) -> str:
    return "without bounds" if value is None else f"{value:.3g}"
