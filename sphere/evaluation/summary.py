"""From per-case scores to the numbers of a table: mean, spread, interval, harmonic mean, retention over time.

A case counts once: its prompts are averaged first, then the cases (as ROME and MEMIT do). Success, accuracy and
scores are in percent, probability differences in percentage points.

Knows the dicts that `sphere.evaluation.scoring` makes. Knows nothing of models, records or files.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sphere.errors import SphereError
from sphere.evaluation.answer_metrics import answer_metric, answer_metrics
from sphere.evaluation.probes import probe_accuracy, probe_metrics

Case = Mapping[str, Any]
Metric = Callable[[Case], float | None]

RESAMPLES = 2000
LEVEL = 95.0  # percent
THIRDS = ("first", "middle", "last")


def _mean_over_prompts(section: str, key: str) -> Metric:
    """A case's mean over the prompts of one section, in percent; None where there is none."""

    def metric(case: Case) -> float | None:
        values = [100.0 * entry[key] for entry in case[section] if entry[key] is not None]
        return statistics.fmean(values) if values else None

    return metric


def _generation(key: str) -> Metric:
    def metric(case: Case) -> float | None:
        return case.get("generation", {}).get(key)

    return metric


GENERATION: dict[str, Metric] = {
    "fluency": _generation("ngram_entropy"),  # bits
    "consistency": _generation("reference_score"),  # tf-idf cosine, in percent
    "essence_perplexity": _generation("essence_perplexity"),
}


def _exact_match(case: Case) -> float | None:
    return 100.0 * case["greedy"]["exact_match"] if "greedy" in case else None


METRICS: dict[str, dict[str, Metric]] = {
    "counterfact": {
        f"{name}_{key}": _mean_over_prompts(section, key)
        for key in ("success", "accuracy", "prob_diff")
        for name, section in (
            ("efficacy", "rewrite"),
            ("paraphrase", "paraphrase"),
            ("neighborhood", "neighborhood"),
        )
    }
    | {"exact_match": _exact_match}
    | GENERATION,
    "zsre": {
        "efficacy_accuracy": _mean_over_prompts("rewrite", "accuracy"),
        "paraphrase_accuracy": _mean_over_prompts("paraphrase", "accuracy"),
        "neighborhood_accuracy_given_answer": _mean_over_prompts("neighborhood", "accuracy_given_answer"),
        "neighborhood_accuracy_unedited_prediction": _mean_over_prompts(
            "neighborhood", "accuracy_unedited_prediction"
        ),
        "exact_match": _exact_match,
    },
}
# Each score is the harmonic mean of efficacy, generalisation and specificity.
SCORES: dict[str, dict[str, tuple[str, str, str]]] = {
    "counterfact": {
        "score": ("efficacy_success", "paraphrase_success", "neighborhood_success"),
        "score_accuracy": ("efficacy_accuracy", "paraphrase_accuracy", "neighborhood_accuracy"),
    },
    "zsre": {
        "score": ("efficacy_accuracy", "paraphrase_accuracy", "neighborhood_accuracy_given_answer"),
        "score_unedited_prediction": (
            "efficacy_accuracy",
            "paraphrase_accuracy",
            "neighborhood_accuracy_unedited_prediction",
        ),
    },
}


def metrics_of(kind: str, cases: Sequence[Case]) -> dict[str, Metric]:
    """The metrics of a kind, and those of further tests and of generated answers that the cases have."""
    tests = dict.fromkeys(name for case in cases for name in probe_metrics(case))
    answers = dict.fromkeys(name for case in cases for name in answer_metrics(case))
    return (
        METRICS[kind]
        | {name: probe_accuracy(name) for name in tests}
        | {name: answer_metric(name) for name in answers}
    )


def summarise(cases: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """Summary of the cases of one checkpoint.

    Returns:
        n_cases, kind; for each of `metrics_of` that any case has: {"mean", "std" (population), "n" (cases that have
        it), "low", "high" (percentile bootstrap over cases, 95 %, seeded)}; for each score of SCORES {"value", "low",
        "high", "of" (the metrics)}, None where one of its metrics is missing.

    Raises:
        SphereError: no cases, or of several kinds.
    """
    kind = _kind_of(cases)
    names, table = _table(kind, [cases])  # (M, n): None becomes NaN
    return {"kind": kind, "n_cases": len(cases)} | _entries(kind, names, table, seed)


def summarise_seeds(runs: Sequence[Sequence[Case]], seed: int = 0) -> dict[str, Any]:
    """Summary of runs of the same facts that differ in their seed; of one run alone what `summarise` says.

    Facts and runs are drawn for the intervals, each on their own (`bootstrap_means`), so that an interval says what
    other facts and other seeds might have given. Two or three runs say little of other seeds.

    Returns:
        As `summarise`, the means over all cases of all runs and n_cases the number of facts; beside that, "seeds" (the
        number of runs) and for each metric and score "seed_std": sample standard deviation over the runs that have it,
        None of a single run.

    Raises:
        SphereError: as `summarise`.
    """
    kind = _kind_of([case for cases in runs for case in cases])
    aligned = align(runs)
    names, table = _table(kind, aligned)
    result: dict[str, Any] = {"kind": kind, "n_cases": len(aligned[0]), "seeds": len(runs)}
    result |= _entries(kind, names, table, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a run without any of a metric: NaN
        means = dict(zip(names, np.nanmean(table, axis=2), strict=True))  # name -> (S,)
    for name, parts in SCORES[kind].items():
        if result[name]:
            of_parts = np.stack([means[part] for part in parts])  # 3 x S
            of_parts = of_parts[:, ~np.isnan(of_parts).any(axis=0)]  # of the runs that have all three
            means[name] = np.array([statistics.harmonic_mean(column) for column in of_parts.T.tolist()])
    for name, own in means.items():
        if result[name]:
            own = own[~np.isnan(own)]  # of the runs that have it
            result[name]["seed_std"] = float(own.std(ddof=1)) if len(own) > 1 else None
    return result


def align(runs: Sequence[Sequence[Case]]) -> list[list[Case | None]]:
    """Each run's cases in one order, that of the first run's facts; None where a run has not the fact."""
    ids = dict.fromkeys(case["case_id"] for cases in runs for case in cases)
    found = [{case["case_id"]: case for case in cases} for cases in runs]
    return [[by_id.get(case_id) for case_id in ids] for by_id in found]


def _kind_of(cases: Sequence[Case]) -> str:
    kinds = {case["kind"] for case in cases}
    if len(kinds) != 1:
        raise SphereError(
            f"Cannot summarise {len(cases)} cases of kinds {sorted(kinds)}: give one kind at a time."
        )
    return str(kinds.pop())


def _table(kind: str, runs: Sequence[Sequence[Case | None]]) -> tuple[list[str], np.ndarray]:
    """The metrics that any case has, and their values: (M, S, n), NaN for those that a case has not."""
    metrics = metrics_of(kind, [case for cases in runs for case in cases if case])
    values = {
        name: [[metric(case) if case else None for case in cases] for cases in runs]
        for name, metric in metrics.items()
    }
    table = np.array(list(values.values()), dtype=float)
    present = ~np.isnan(table).all(axis=(1, 2))
    return [name for name, there in zip(values, present, strict=True) if there], table[present]


def _entries(kind: str, names: Sequence[str], table: np.ndarray, seed: int) -> dict[str, Any]:
    """Metrics and scores with their intervals, of the values of cases (M, S, n)."""
    resampled = dict(zip(names, bootstrap_means(table, seed), strict=True))  # name -> (B,)
    result: dict[str, Any] = {}
    for name, values in zip(names, table, strict=True):
        column = values[~np.isnan(values)]
        low, high = interval(resampled[name])
        result[name] = {
            "mean": float(column.mean()),
            "std": float(column.std()),
            "n": len(column),
            "low": low,
            "high": high,
        }
    for name, parts in SCORES[kind].items():
        result[name] = _score(result, resampled, parts) if all(part in names for part in parts) else None
    return result


def _score(
    result: Mapping[str, Any], resampled: Mapping[str, np.ndarray], parts: Sequence[str]
) -> dict[str, Any]:
    """The harmonic mean of three means, with the interval of its own bootstrap distribution."""
    drawn = np.stack([resampled[part] for part in parts])  # (3, B)
    with np.errstate(divide="ignore"):
        low, high = interval(len(parts) / (1 / drawn).sum(axis=0))  # 1/0 is inf: the mean is 0
    value = statistics.harmonic_mean([result[part]["mean"] for part in parts])
    return {"value": value, "low": low, "high": high, "of": list(parts)}


def bootstrap_means(table: np.ndarray, seed: int) -> np.ndarray:
    """Means of cases drawn with replacement, all metrics of a draw over the same cases; NaNs are left out.

    Args:
        table: (M, n) metrics of cases; (M, S, n) of S runs of the same facts: then facts are drawn and runs are drawn,
            independently (the pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122).

    Returns:
        (M, RESAMPLES)
    """
    runs = table.reshape(len(table), -1, table.shape[-1])  # M x S x n
    m, s, n = runs.shape
    of_facts, of_runs = np.random.default_rng(seed), np.random.default_rng([seed, s])
    present = ~np.isnan(runs)
    filled = np.where(present, runs, 0.0)
    draws = []
    for size in _chunks(RESAMPLES, max(1, 10_000_000 // n)):
        facts = of_facts.multinomial(n, np.full(n, 1 / n), size=size).astype(float)  # b x n
        times = of_runs.multinomial(s, np.full(s, 1 / s), size=size).astype(float)  # b x S

        def total(values: np.ndarray, facts: np.ndarray = facts, times: np.ndarray = times) -> np.ndarray:
            over_facts = (values.reshape(m * s, n) @ facts.T).reshape(m, s, -1)  # M x S x b
            return np.einsum("msb,bs->mb", over_facts, times)

        with np.errstate(invalid="ignore"):
            draws.append(total(filled) / total(present.astype(float)))  # M x b
    return np.concatenate(draws, axis=1)


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def interval(draws: np.ndarray) -> tuple[float, float]:
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def retention(cases: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """Summaries by when a fact was edited: the first, middle and last third of the cases in the order of editing."""
    thirds = np.array_split(np.arange(len(cases)), 3)
    return {
        name: summarise([cases[i] for i in third], seed)
        for name, third in zip(THIRDS, thirds, strict=True)
        if len(third)
    }


# ---- the table ----

COLUMNS: dict[str, dict[str, str]] = {
    "counterfact": {
        "efficacy": "efficacy_success",
        "paraphrase": "paraphrase_success",
        "neighborhood": "neighborhood_success",
        "score": "score",
        "eff. acc.": "efficacy_accuracy",
        "par. acc.": "paraphrase_accuracy",
        "nei. acc.": "neighborhood_accuracy",
        "exact match": "exact_match",
        "fluency": "fluency",
        "consistency": "consistency",
        "perplexity": "essence_perplexity",
    },
    "zsre": {
        "efficacy": "efficacy_accuracy",
        "paraphrase": "paraphrase_accuracy",
        "neighbor (answer)": "neighborhood_accuracy_given_answer",
        "neighbor (unedited)": "neighborhood_accuracy_unedited_prediction",
        "score": "score",
        "exact match": "exact_match",
    },
}
# Of the state as a whole, not of cases: title -> (where in a row, how it is written).
STATE_COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[float], str]]] = {
    "text perpl.": (("text_perplexity",), "{:#.4g}".format),
    "energy": (("weights", "energy_change"), lambda change: percent(change)),
    "rotation": (("weights", "rotation"), "{:.4f}".format),
    "||change||": (("weights", "change_norm"), "{:.2f}".format),
}
WITH_INTERVAL = ("efficacy", "paraphrase", "neighborhood", "score", "exact match")
DECIMALS = {"fluency": 2}  # bits; the others need one


def format_table(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """A table of checkpoints for the terminal, or as Markdown; see `table_lines`."""
    return format_lines(table_lines(rows), markdown)


def table_lines(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table of checkpoints as cells, the first line its head.

    Args:
        rows: a summary as `evaluate_run` returns it, or rows such as those of its "checkpoints":
            {"label", "n_edits", "metrics": what `summarise` returns}, and optionally "text_perplexity" and "weights" as
            in a summary, and "extra": {title: text} of further columns.
    """
    rows = list(rows["checkpoints"] if isinstance(rows, Mapping) else rows)
    extra = list(dict.fromkeys(title for row in rows for title in row.get("extra", {})))
    kind = rows[0]["metrics"]["kind"]
    columns = {
        title: name for title, name in COLUMNS[kind].items() if any(row["metrics"].get(name) for row in rows)
    }
    states = {
        title: write
        for title, (path, write) in STATE_COLUMNS.items()
        if any(_at(row, path) is not None for row in rows)
    }
    lines = [["weights", "edits", "cases", *columns, *states, *extra]]
    for row in rows:
        cells = [
            cell(row["metrics"].get(name), title in WITH_INTERVAL, DECIMALS.get(title, 1))
            for title, name in columns.items()
        ]
        for title, write in states.items():
            value = _at(row, STATE_COLUMNS[title][0])
            cells.append("-" if value is None else write(value))
        cells += [row.get("extra", {}).get(title, "-") for title in extra]
        lines.append([row["label"], str(row["n_edits"]), str(row["metrics"]["n_cases"]), *cells])
    return lines


def _at(row: Mapping[str, Any], path: Sequence[str]) -> Any:
    """What lies at a path of keys, None where it ends before."""
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def percent(share: float) -> str:
    """A relative change as text, in percent, or in parts per million where it is tiny."""
    if share and abs(share) < 1e-4:
        return f"{1e6 * share:+.2f} ppm"
    return f"{100 * share:+.3g} %"


def format_lines(lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """A table of cells, the first line its head, for the terminal or as Markdown."""
    return _markdown(lines) if markdown else _aligned(lines)


def cell(entry: Mapping[str, Any] | None, interval: bool = True, decimals: int = 1) -> str:
    """A metric or score of `summarise` as text, with or without its interval; "-" for None."""
    if not entry:
        return "-"
    value = entry["value"] if "value" in entry else entry["mean"]
    text = f"{value:.{decimals}f}"
    return f"{text} [{entry['low']:.{decimals}f}, {entry['high']:.{decimals}f}]" if interval else text


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
