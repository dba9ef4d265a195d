"""Differences of two runs over the same facts, with intervals that know that the facts are the same.

Facts differ in how hard they are, and two runs find the same ones hard: the interval of their difference is narrower
than those of the two scores suggest. Resamples draw facts, and take both runs' cases of each.

Knows the dicts that `sphere.evaluation.scoring` makes. Knows nothing of files.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from sphere.errors import SphereError
from sphere.evaluation.summary import SCORES, Case, align, bootstrap_means, interval, metrics_of


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
    return differences_over_seeds([first], [second], seed)


def differences_over_seeds(
    first: Sequence[Sequence[Case]], second: Sequence[Sequence[Case]], seed: int = 0
) -> dict[str, Any]:
    """The same of two configurations, each run with the same seeds: facts and seeds are drawn for both at once.

    Args:
        first, second: cases of each one's runs, both in the order of the seeds; a fact counts where both runs of a seed
            have it.

    Returns:
        As `paired_differences`; n_cases is the number of facts.

    Raises:
        SphereError: as `paired_differences`.
    """
    common = [
        {case["case_id"] for case in one} & {case["case_id"] for case in other}
        for one, other in zip(first, second, strict=True)
    ]
    aligned = align([
        [case for case in cases if case["case_id"] in ids]
        for runs in (first, second)
        for cases, ids in zip(runs, common, strict=True)
    ])  # fmt: skip
    cases = [case for run in aligned for case in run if case]
    kinds = {case["kind"] for case in cases}
    if len(kinds) != 1:
        raise SphereError(
            f"The two runs have {len(set().union(*common))} facts in common, of kinds {sorted(kinds)}: compare runs of "
            "one dataset."
        )
    kind = kinds.pop()
    names, columns = [], []
    for name, metric in metrics_of(kind, cases).items():
        values = np.array([[metric(case) if case else None for case in run] for run in aligned], dtype=float)
        values = values.reshape(2, len(first), -1)  # 2 x S x n
        values[:, np.isnan(values).any(axis=0)] = np.nan  # a pair counts where both have the metric
        if not np.isnan(values).all():
            names.append(name)
            columns.append(values)
    table = np.concatenate(columns)  # 2 M x S x n: first and second of each metric in turn
    drawn = bootstrap_means(table, seed).reshape(len(names), 2, -1)  # M x 2 x B
    means = np.nanmean(table, axis=(1, 2)).reshape(len(names), 2)  # M x 2
    result: dict[str, Any] = {"n_cases": len(aligned[0])}
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
