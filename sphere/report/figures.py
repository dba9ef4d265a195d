"""The figures of a report: each function takes runs and gives a figure, or None where nothing can be drawn.

Knows `RunData` and how the numbers are to be read. Knows nothing of files or pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from sphere.downstream.published import PREFIX
from sphere.evaluation.summary import THIRDS
from sphere.report.collect import RunData
from sphere.report.guard_figure import guard
from sphere.report.lines import EDITS, Drawn, intervals, percent_limits, slug, value
from sphere.report.pairs import Pair
from sphere.report.style import GREY, Style, grid, label_axes, legend, styles
from sphere.report.weight_figures import (
    change_unit,
    cosines,
    energy_change,
    energy_lines,
    principal_share,
    whole_model,
)

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
TASK_NAMES |= {f"{PREFIX}{name}": f"{title}, published form" for name, title in TASK_NAMES.items()}


def draw(runs: Sequence[RunData], pairs: Sequence[Pair] = ()) -> list[Drawn]:
    """All figures that these runs have the numbers for, in the order of reading.

    Args:
        pairs: of `sphere.report.pairs.compare`.
    """
    look = looks(runs)
    drawn: list[Drawn | None] = [energy_change(runs, look)]
    kinds = sorted({run.kind for run in runs if run.kind})
    suffixes = {kind: "" if len(kinds) == 1 else f" ({kind})" for kind in kinds}
    by_kind = {kind: [run for run in runs if run.kind == kind] for kind in kinds}
    drawn += [score(by_kind[kind], look, suffixes[kind]) for kind in kinds]
    drawn += [paired([p for p in pairs if p["kind"] == kind], look, suffixes[kind]) for kind in kinds]
    drawn.append(whole_model(runs, look))
    for draw_one in (energy_against_score, retention):
        drawn += [draw_one(by_kind[kind], look, suffixes[kind]) for kind in kinds]
    drawn += [cosines(runs, look), downstream(runs, look), principal_share(runs, look), guard(runs, look)]
    return [figure for figure in drawn if figure]


def looks(runs: Sequence[RunData]) -> dict[str, Style]:
    """How each run is drawn in all figures, by its label."""
    return dict(zip((r.label for r in runs), styles([(r.method, r.has_sphere) for r in runs]), strict=True))


def score_and_energy(runs: Sequence[RunData]) -> Drawn:
    """Score and energy change of scored runs of one dataset against the number of edits, beside each other."""
    look = looks(runs)
    figure, (left, right) = grid(2, 2, 2.9)
    for position, run in enumerate(runs):
        x, entries = [row["n_edits"] for row in run.scored], [row["metrics"]["score"] for row in run.scored]
        intervals(left, x, entries, run.label, look[run.label], position, len(runs))
    label_axes(left, EDITS, "Score (%)")
    left.set_ylim(*percent_limits(left))
    energy_lines(right, [run for run in runs if run.energy_changes], look)
    legend(figure)
    return Drawn("score_and_energy", "Score and energy change against number of edits", "", figure)


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
            intervals(
                axes,
                x,
                [row["metrics"][key] for row in rows],
                run.label,
                look[run.label],
                position,
                len(runs),
            )
        axes.margins(x=0.06, y=0.08)
        axes.set_title(name)
        label_axes(axes, EDITS, "%")
        axes.set_ylim(*percent_limits(axes))
    legend(figure)
    caption = (
        "Each checkpoint scored on all facts edited up to it. The score is the harmonic mean of the other three. Bars: "
        "95 % bootstrap interval over the facts (it says nothing of other seeds or other orders of editing). Points of "
        "one checkpoint are drawn beside each other where they would overlap."
    )
    return Drawn(f"score{slug(suffix)}", f"Editing score against number of edits{suffix}", caption, figure)


def paired(pairs: Sequence[Pair], look: dict[str, Style], suffix: str) -> Drawn | None:
    """Differences of score, efficacy, paraphrase and neighborhood against the number of edits, run minus reference."""
    if not pairs:
        return None
    parts = SCORE_PARTS[pairs[0]["kind"]]
    parts = {k: name for k, name in parts.items() if any(k in row for p in pairs for row in p["differences"])}
    figure, panels = grid(len(parts), 2, 2.7)
    for axes, (key, name) in zip(panels, parts.items(), strict=True):
        for position, pair in enumerate(pairs):
            rows = [row for row in pair["differences"] if key in row]
            label, style = pair["run"]["label"], look[pair["run"]["label"]]
            intervals(
                axes,
                [row["n_edits"] for row in rows],
                [row[key] for row in rows],
                f"{label} − {pair['reference']['label']}",
                replace(style, dashed=False),
                position,
                len(pairs),
            )
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.margins(x=0.06, y=0.08)
        axes.set_title(name)
        label_axes(axes, EDITS, "Percentage points")
    legend(figure)
    caption = (
        "The same facts, edited in the same order: run minus reference; above 0 the run is better. Bars: 95 % "
        "bootstrap interval over the facts, each drawn with both of its outcomes: it says more than the intervals of "
        "the two scores."
    )
    return Drawn(
        f"paired{slug(suffix)}", f"Paired differences against number of edits{suffix}", caption, figure
    )


def score_points(run: RunData) -> list[tuple[float, float]]:
    """(size of the mean relative energy change, score in percent) of each scored checkpoint whose energy is known."""
    points = []
    for row in run.scored:
        changes, entry = run.energy_changes.get(row["n_edits"]), row["metrics"]["score"]
        if changes and entry:
            points.append((abs(fmean(changes.values())), value(entry)))
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
    name, title = f"energy_against_score{slug(suffix)}", f"Energy change against score{suffix}"
    return Drawn(name, title, caption, figure)


def retention(runs: Sequence[RunData], look: dict[str, Style], suffix: str) -> Drawn | None:
    """Score of the last scored checkpoint by when a fact was edited."""
    shown = [run for run in runs if any(third.get("score") for third in _last_thirds(run).values())]
    if not shown:
        return None
    figure, (axes,) = grid(1, 1, 3.4)
    for position, run in enumerate(shown):
        thirds = _last_thirds(run)
        x = [i for i, name in enumerate(THIRDS) if thirds.get(name, {}).get("score")]
        entries = [thirds[THIRDS[i]]["score"] for i in x]
        ended = run.scored_edits == run.n_edits
        intervals(
            axes,
            x,
            entries,
            run.label if ended else f"{run.label}, after {run.scored_edits} edits",
            look[run.label],
            position,
            len(shown),
            span=min(0.07 * len(shown), 0.5),
        )
    label_axes(axes, "When the fact was edited", "Score (%)")
    axes.set_xticks(range(len(THIRDS)), [f"{name} third" for name in THIRDS])
    axes.set_ylim(*percent_limits(axes))
    legend(figure)
    caption = (
        "The last checkpoint's score (where a number of edits is named: that of the last one that is scored), split "
        "by when a fact was edited: a first third below the last one is forgetting. Bars: 95 % bootstrap interval over "
        "the facts."
    )
    title = f"Retention: score by time of editing{suffix}"
    return Drawn(f"retention{slug(suffix)}", title, caption, figure)


def _last_thirds(run: RunData) -> dict[str, Any]:
    return run.scored[-1].get("retention", {}) if run.scored else {}


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
            intervals(axes, [n for n, _ in rows], entries, run.label, look[run.label], position, len(runs))
        axes.set_title(TASK_NAMES.get(task, task))
        label_axes(axes, EDITS, "Accuracy (%)")
        axes.set_ylim(*percent_limits(axes))
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
