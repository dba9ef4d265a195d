"""The tables of a report, as cells of text; Spearman's correlation of energy change and score.

Knows `RunData`. Knows nothing of HTML.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from sphere.evaluation.further_tables import further_lines
from sphere.evaluation.summary import THIRDS, cell, percent, table_lines
from sphere.report.collect import RunData
from sphere.report.comparison import Board, comparison_lines, difference_lines, file_suffix, suffix_of
from sphere.report.figures import TASK_NAMES, score_points, task_rows
from sphere.report.pairs import Pair, paired_lines
from sphere.report.weight_figures import share_rows
from sphere.strength import AUTO, in_words

FEW = 10  # points below which the p-value comes from permutations
FEWEST = 3  # points below which a rank correlation says nothing


@dataclass(frozen=True)
class Table:
    """Cells, the first line the head.

    Attributes:
        section: name of the figure under which it stands; "" for the page's beginning.
        folded: whether it is shown only on demand.
    """

    title: str
    lines: list[list[str]]
    section: str = ""
    note: str = ""
    folded: bool = False

    @property
    def text_columns(self) -> set[int]:
        """Columns that hold words, to be set from the left; numbers are set from the right."""
        return {i for line in self.lines[1:] for i, text in enumerate(line) if text[:1].isalpha()}


def markdown(table: Table) -> str:
    """The table as Markdown, under a heading of its own, with its note."""
    head, *lines = table.lines
    rule = ["---" if i in table.text_columns else "---:" for i in range(len(head))]
    rows = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (head, rule, *lines)]
    rows = [f"| {row} |" for row in rows]
    return "\n".join([f"## {table.title}", "", *rows, *(["", table.note] if table.note else []), ""])


def tables(runs: Sequence[RunData], pairs: Sequence[Pair] = (), boards: Sequence[Board] = ()) -> list[Table]:
    """All tables that these runs have the numbers for.

    Args:
        pairs: of `sphere.report.pairs.compare`.
        boards: of `sphere.report.comparison.boards`.
    """
    kinds = sorted({run.kind for run in runs if run.kind})
    made = [overview(runs), *(table for board in boards for table in compared(board, boards))]
    for kind in kinds:
        chosen = [run for run in runs if run.kind == kind]
        suffix = "" if len(kinds) == 1 else f"_{kind}"
        made += [
            *scores(chosen, suffix),
            *paired(pairs, kind, suffix),
            correlation(chosen, suffix),
            thirds(chosen, suffix),
        ]
    made += [*downstream(runs), *layers(runs)]
    return [table for table in made if len(table.lines) > 1]


def overview(runs: Sequence[RunData]) -> Table:
    """One line per run: what it is, and its state after the last edit, or the last one that is scored."""
    described = {
        "model": lambda run: run.model,
        "dataset": lambda run: str(run.config.get("ds_name", "-")),
        "edits": lambda run: str(run.n_edits),
        "per batch": lambda run: str(run.config.get("num_edits", "-")),
        "β": lambda run: _setting(run, "beta_hse", "rank", ".0f") if run.has_sphere else "-",
        "α": lambda run: _setting(run, "alpha", "alpha", ".2f") if run.has_sphere else "-",
    }
    # What is the same for all runs stands in the page's first sentence; it need not fill a column.
    columns = {
        head: say
        for head, say in described.items()
        if head not in ("model", "dataset") or len({say(run) for run in runs}) > 1
    }
    lines = [["run", *columns, "s / batch", "score (%)", "energy change", "principal share (%)"]]
    for run in runs:
        seconds = [batch["seconds"] for batch in run.batches if "seconds" in batch]
        shown = run.scored_edits or run.n_edits
        changes = run.energy_changes.get(shown)
        after = f" after {shown}" if shown < run.n_edits else ""  # score and energy are of one state
        shares = share_rows(run)
        lines.append(
            [
                run.label,
                *(say(run) for say in columns.values()),
                f"{np.median(seconds):.1f}" if seconds else "-",
                cell(run.scored[-1]["metrics"]["score"]) + after if run.scored else "-",
                percent(fmean(changes.values())) + after if changes else "-",
                _shares(shares) if shares else "-",
            ]
        )
    return Table(
        "Runs",
        lines,
        note="β and α: cumulative ratio and strength of the SPHERE hook; where auto chose them, the least and the "
        "largest r and α of all batches and weights. s / batch: median seconds. Score with its 95 % bootstrap "
        "interval, and energy change, mean over the edited weights: after the run's edits, or after as many as they "
        "name, where its scores end earlier; ppm: parts per million. Principal share of the updates: before the hook → "
        "as written, mean over batches.",
    )


def _setting(run: RunData, name: str, metric: str, digits: str) -> str:
    """A number of the hook; what came of it where it is "auto"."""
    value = run.config[name]
    layers = [metrics for batch in run.batches for metrics in batch.get("layers", {}).values()]
    if value != AUTO or not (found := [metrics[metric] for metrics in layers if metric in metrics]):
        return in_words(value)
    return f"{AUTO} ({min(found):{digits}} to {max(found):{digits}})"


def _shares(rows: Sequence[tuple[int, float, float]]) -> str:
    before, after = (100 * fmean(row[i] for row in rows) for i in (1, 2))
    return f"{before:.1f} → {after:.1f}" if before != after else f"{after:.1f}"


def scores(runs: Sequence[RunData], suffix: str) -> list[Table]:
    """The unedited model and the last scored checkpoints; every one on demand."""
    last, every = [], []
    for run in runs:
        unedited = [row | {"label": "unedited model"} for row in run.rows if not row["n_edits"]]
        unedited = [row for row in unedited if row not in every]  # runs on the same facts share it
        rows = [row | {"label": run.label} for row in run.scored]
        last += unedited + rows[-1:]
        every += unedited + rows
    note = (
        "Percent, with the 95 % bootstrap interval in brackets; fluency in bits. The unedited model is scored on all "
        "facts of the run. Text perpl.: perplexity of the fixed text; energy change, rotation of the principal "
        "directions (0: as before, 1: orthogonal to them) and norm of the change are means over the edited weights."
    )
    section = f"score{suffix}"
    made = [Table("Scores of the last scored checkpoint", _named("run", table_lines(last)), section, note)]
    if len(every) > len(last):
        made.append(
            Table(
                "Scores of every scored checkpoint", _named("run", table_lines(every)), section, folded=True
            )
        )
    further = (
        "Teacher-forced: the model is shown the answer's first tokens. Generated: it is shown the prompt alone, and "
        "its text to the end of a line or sentence is compared with the answer, up to case, punctuation and articles. "
        "Further tests have their authors' names. Percent, with 95 % bootstrap intervals."
    )
    made.append(
        Table(
            "Generated answers and further tests",
            _named("run", further_lines(last)),
            f"further{suffix}",
            further,
        )
    )
    return made


def compared(board: Board, boards: Sequence[Board]) -> list[Table]:
    """Configurations whatever their seed, and their paired differences."""
    section, suffix = f"comparison{file_suffix(board, boards)}", suffix_of(board, boards)
    note = (
        "At the last checkpoint that is scored for all seeds; percent, means over facts and seeds. Intervals: 95 %, "
        "facts and (where there are several) seeds drawn. Between seeds: sample standard deviation of the runs' "
        "scores. Perplexity and what is said of the weights: means over seeds."
    )
    of_differences = (
        "Percentage points, over the same facts and the same seeds of both. 95 % intervals of the paired difference, "
        "facts and seeds drawn for both at once, each by itself: of many, some leave out 0 by chance."
    )
    return [
        Table(f"Configurations compared{suffix}", comparison_lines(board), section, note),
        Table(f"Their paired differences{suffix}", difference_lines(board), section, of_differences),
    ]


def paired(pairs: Sequence[Pair], kind: str, suffix: str) -> list[Table]:
    """Paired differences at the largest common number of edits; at all of them on demand."""
    last, every = paired_lines(pairs, kind, last=True), paired_lines(pairs, kind)
    note = (
        "Run minus reference in percentage points, over the facts that both edited, with 95 % bootstrap intervals of "
        "the paired difference: one that leaves out 0 is not chance in the choice of facts."
    )
    made = [Table("Paired differences at the last common checkpoint", last, f"paired{suffix}", note)]
    if len(every) > len(last):
        made.append(Table("Paired differences at every checkpoint", every, f"paired{suffix}", folded=True))
    return made


def _named(first: str, lines: list[list[str]]) -> list[list[str]]:
    """The same lines with another name of the first column."""
    return [[first, *lines[0][1:]], *lines[1:]]


def thirds(runs: Sequence[RunData], suffix: str) -> Table:
    """Scores of the last scored checkpoint by when a fact was edited."""
    lines = [["run", "edits", *(f"{name} third" for name in THIRDS)]]
    for run in runs:
        parts = run.scored[-1].get("retention", {}) if run.scored else {}
        if parts:
            cells = [cell(parts.get(name, {}).get("score")) for name in THIRDS]
            lines.append([run.label, str(run.scored_edits), *cells])
    return Table(
        "Score of the last scored checkpoint by when a fact was edited (%)", lines, f"retention{suffix}"
    )


def correlation(runs: Sequence[RunData], suffix: str) -> Table:
    """Spearman's correlation between size of energy change and score: all runs together, and each."""
    lines = [["runs", "checkpoints", "Spearman's ρ", "p"]]
    everything = [point for run in runs for point in score_points(run)]
    groups = [("all", everything), *((run.label, score_points(run)) for run in runs)]
    for name, points in groups if len(runs) > 1 else groups[1:]:
        found = spearman(points)
        rho, p = (f"{found[0]:+.2f}", f"{found[1]:.2g}") if found else ("-", "-")
        lines.append([name, str(len(points)), rho, p])
    return Table(
        "Rank correlation of energy change and score",
        lines,
        f"energy_against_score{suffix}",
        "Negative: the more the energy changes, the lower the score. Checkpoints of one run follow each other and are "
        "not independent, so p is too small; a dash: fewer than three points, or no variation.",
    )


def spearman(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(rho, two-sided p) of scipy's `spearmanr`; p by permutation below `FEW` points. None where undefined."""
    if len(points) < FEWEST:
        return None
    x, y = np.array(points).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rho, p = stats.spearmanr(x, y)
        if len(points) < FEW:
            p = stats.permutation_test(
                (x,),
                lambda permuted: stats.spearmanr(permuted, y).statistic,
                permutation_type="pairings",
                rng=np.random.default_rng(0),
                vectorized=False,
                n_resamples=999,
            ).pvalue
    return float(rho), float(p)


def downstream(runs: Sequence[RunData]) -> list[Table]:
    """Accuracies of the first and last states measured; of every one, and other metrics, on demand."""
    names = list(dict.fromkeys(task for run in runs for _, scores in task_rows(run) for task in scores))
    head = ["run", "edits", "n", *(TASK_NAMES.get(name, name) for name in names)]
    last, every, others = [head], [head], [["run", "edits", "task", "metrics"]]
    for run in runs:
        rows = task_rows(run)
        lines = []
        for n_edits, found in rows:
            counts = sorted({scores["n"] for scores in found.values()})
            lines.append(
                [
                    run.label,
                    str(n_edits),
                    " / ".join(map(str, counts)),
                    *(_accuracy(found.get(n)) for n in names),
                ]
            )
            others += [
                [run.label, str(n_edits), TASK_NAMES.get(name, name), _others(scores)]
                for name, scores in found.items()
            ]
            others += [
                [run.label, str(n_edits), f"lm-eval: {task}", _harness(metrics)]
                for task, metrics in _harness_rows(run).get(n_edits, {}).items()
            ]
        last += lines[:1] + lines[1:][-1:]
        every += lines
    note = "Accuracy in percent with its Wilson 95 % interval; n examples of each task. 0 edits: the unedited model."
    made = [Table("Downstream accuracy of the first and the last state measured", last, "downstream", note)]
    if len(every) > len(last):
        made.append(Table("Downstream accuracy of every state measured", every, "downstream", folded=True))
    return [*made, Table("Further downstream metrics", others, "downstream", folded=True)]


def _accuracy(scores: dict[str, Any] | None) -> str:
    if not scores:
        return "-"
    low, high = (100 * end for end in scores["accuracy_interval"])
    return f"{100 * scores['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def _others(scores: dict[str, Any]) -> str:
    parts = []
    shown = {"exact_match": "exact match", "f1": "F1", "accuracy_of_valid": "accuracy of valid outputs"}
    shown |= {"choice_accuracy": "accuracy of the likelier answer", "choice_f1": "its F1"}
    for key, name in shown.items():
        if scores.get(key) is not None:
            parts.append(f"{name} {100 * scores[key]:.1f} %")
    if "mcc" in scores:
        parts.append(f"MCC {scores['mcc']:.2f}")
    return ", ".join([*parts, f"without an answer {scores.get('unparsed', 0)} of {scores['n']}"])


def _harness_rows(run: RunData) -> dict[int, dict[str, Any]]:
    entries = run.downstream["checkpoints"].values() if run.downstream else ()
    return {entry["n_edits"]: entry.get("lm_eval", {}) for entry in entries}


def _harness(metrics: dict[str, Any]) -> str:
    found = {k: v for k, v in metrics.items() if isinstance(v, float) and "stderr" not in k}
    return ", ".join(
        [*(f"{key} {value:.3f}" for key, value in found.items()), f"n = {metrics.get('n', '?')}"]
    )


def layers(runs: Sequence[RunData]) -> list[Table]:
    """Figures of each edited weight after the last batch that was measured; one table for all runs."""
    lines = [
        [
            "run",
            "edits",
            "weight",
            "energy",
            "energy change",
            "‖Δ‖ of the batch",
            "rank r",
            "condition number",
        ]
    ]
    for run in runs:
        measured = [b for b in run.batches if any("energy" in f for f in b["layers"].values())]
        for name, figures in measured[-1]["layers"].items() if measured else ():
            condition = figures.get("condition")
            lines.append(
                [
                    run.label,
                    str(measured[-1]["n_edits"]),
                    short_name(name),
                    f"{figures['energy']:,.1f}",
                    percent(figures["energy_change"]),
                    f"{figures['delta_norm']:#.3g}",
                    f"{figures['rank']:g}" if "rank" in figures else "-",
                    f"{condition:#.3g}" if condition else "∞",
                ]
            )
    note = "After the last batch that was measured. r: number of principal directions."
    return [Table("Each edited weight", lines, "energy_change", note, folded=True)]


def short_name(weight: str) -> str:
    """ "model.layers.4.mlp.down_proj.weight" -> "layer 4, mlp.down_proj"."""
    match = re.fullmatch(r".*?\.(\d+)\.(.+)\.weight", weight)
    return f"layer {match[1]}, {match[2]}" if match else weight
