"""Differences of two runs over the same facts, with intervals that know that the facts are the same.

Facts differ in how hard they are, and two runs find the same ones hard: the interval of their difference is narrower
than those of the two scores suggest. Resamples draw facts, and take both runs' cases of each.

Knows the dicts that `sphere.evaluation.scoring` makes. Knows nothing of files.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sphere.errors import SphereError
from sphere.evaluation.summary import SCORES, Case, bootstrap_means, interval, metrics_of


def paired_differences(first: Sequence[Case], second: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """Second minus first, for each metric and score of `sphere.evaluation.summary`.

    Args:
        first, second: cases of two runs; those that both have (by case_id) are compared.
        seed: of the bootstrap.

    Returns:
        n_cases; for each metric and score {"difference", "low", "high" (percentile bootstrap over cases, 95 %)}.

    Raises:
        SphereError: no case in common, or cases of several kinds.
    """
    by_id: Mapping[int, Case] = {case["case_id"]: case for case in first}
    pairs = [(by_id[case["case_id"]], case) for case in second if case["case_id"] in by_id]
    kinds = {case["kind"] for pair in pairs for case in pair}
    if len(kinds) != 1:
        raise SphereError(
            f"The two runs have {len(pairs)} facts in common, of kinds {sorted(kinds)}: compare runs of one dataset."
        )
    kind = kinds.pop()
    names, columns = [], []
    for name, metric in metrics_of(kind, [*first, *second]).items():
        values = np.array([[metric(case) for case in pair] for pair in pairs], dtype=float).T  # 2 x n
        values[:, np.isnan(values).any(axis=0)] = np.nan  # a pair counts where both have the metric
        if not np.isnan(values).all():
            names.append(name)
            columns.append(values)
    table = np.concatenate(columns)  # 2 M x n: first and second of each metric in turn
    drawn = bootstrap_means(table, seed).reshape(len(names), 2, -1)  # M x 2 x B
    means = np.nanmean(table, axis=1).reshape(len(names), 2)  # M x 2
    result: dict[str, Any] = {"n_cases": len(pairs)}
    for name, mean, draws in zip(names, means, drawn, strict=True):
        result[name] = _entry(mean[1] - mean[0], draws[1] - draws[0])
    for score, parts in SCORES[kind].items():
        if all(part in names for part in parts):
            at = [names.index(part) for part in parts]
            value = [statistics.harmonic_mean(means[at, run].tolist()) for run in (0, 1)]
            with np.errstate(divide="ignore"):
                draws = len(at) / (1 / drawn[at]).sum(axis=0)  # 2 x B; 1/0 is inf: the mean is 0
            result[score] = _entry(value[1] - value[0], draws[1] - draws[0])
    return result


def _entry(difference: float, draws: np.ndarray) -> dict[str, float]:
    low, high = interval(draws)
    return {"difference": float(difference), "low": low, "high": high}
