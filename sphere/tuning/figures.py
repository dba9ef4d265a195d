"""The two figures of a tuning: effects by layer, scores by trial. Knows matplotlib and numbers, nothing of files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sphere.evaluation.summary import bootstrap_means, interval
from sphere.report.figures import Drawn
from sphere.report.style import GREY, PALETTE, grid, label_axes, legend

PERCENT = 100.0


def effects(indirect: Tensor, layers: Sequence[int], seed: int = 0) -> Drawn:
    """Average indirect effect of each layer with its bootstrap interval, and the layers chosen.

    Args:
        indirect: (facts x layers), see `sphere.tuning.causal_trace.Trace.indirect`.
    """
    table = PERCENT * indirect.double().T.contiguous().numpy()  # layers x facts
    low, high = zip(*(interval(draws) for draws in bootstrap_means(table, seed)), strict=True)
    x = list(range(len(table)))
    figure, (axes,) = grid(1, 1, 3.2)
    axes.axvspan(min(layers) - 0.5, max(layers) + 0.5, color=GREY, alpha=0.15, label="layers to edit")
    axes.fill_between(x, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
    axes.plot(x, table.mean(axis=1), color=PALETTE[0], marker="o", label="average indirect effect")
    label_axes(
        axes, "Layer whose output is restored at the subject's last token", "Recovered probability (%)"
    )
    legend(figure)
    caption = (
        f"Causal tracing on {table.shape[1]} facts that the model knows: by how much the probability of the right "
        "token rises when one hidden state of the clean run is put back into a run with noise on the subject's "
        "embeddings. Band: 95 % bootstrap interval over the facts."
    )
    return Drawn("causal_trace", "Average indirect effect by layer", caption, figure)


def history(values: Sequence[float], pruned: Sequence[bool]) -> Drawn:
    """The value of each trial in order, and the best so far among those that ran to their end."""
    figure: Figure
    figure, (axes,) = grid(1, 1, 3.2)
    x = torch.arange(len(values)).tolist()
    for stopped, look, label in ((False, PALETTE[0], "trial"), (True, "white", "trial stopped early")):
        chosen = [n for n in x if pruned[n] == stopped]
        if chosen:
            axes.scatter(
                chosen, [values[n] for n in chosen], color=look, edgecolor=PALETTE[0], label=label, zorder=3
            )
    best, line = 0.0, []
    for value, stopped in zip(values, pruned, strict=True):
        best = best if stopped else max(best, value)
        line.append(best)
    axes.step(x, line, where="post", color=PALETTE[1], label="best so far")
    label_axes(axes, "Trial", "Objective (%)")
    legend(figure)
    caption = (
        "The objective of each trial: the score on the tuning set, reduced where the perplexity of the fixed text rose "
        "too far. A trial that was stopped early is shown with the score of its first facts."
    )
    return Drawn("history", "Objective by trial", caption, figure)
