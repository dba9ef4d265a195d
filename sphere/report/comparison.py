"""Configurations beside one another, whatever their seed: one table, and paired differences over facts and seeds.

Runs that differ in their seed only (and so in the order of their facts, where they are shuffled) are one configuration;
configurations of one model on the same facts are compared. Each is compared with a reference, and with its method's
plain one. Knows `RunData` and the scored cases on disk. Knows nothing of figures or pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sphere.errors import SphereError
from sphere.evaluation.paired import differences_over_seeds
from sphere.evaluation.scoring import Case
from sphere.evaluation.summary import format_lines, summarise_seeds, table_lines
from sphere.report.collect import RunData, labels
from sphere.report.lines import slug
from sphere.report.pairs import DECIDED, Pair, agree, is_plain, paired_lines, scored_cases

UNITS = (
    "run minus reference, in percentage points; intervals: percentile bootstrap over facts and seeds, 95 %"
)
OF_A_SEED = ("seed", "case_ids", "requests")  # what another seed changes in run.json
HOOK = ("beta_hse", "alpha", "alpha_budget", "rules", "directions", "project", "revive_tau")
Board = dict[str, Any]  # see `boards`


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed only.

    Attributes:
        label: without the seed; distinct on its board.
        runs: seed -> run.
    """

    label: str
    runs: Mapping[int, RunData]

    @property
    def first(self) -> RunData:
        return next(iter(self.runs.values()))

    @property
    def n_edits(self) -> int | None:
        """The largest number of edits that all runs were scored at."""
        return max(self.common_edits, default=None)

    @property
    def common_edits(self) -> set[int]:
        """Numbers of edits that all runs were scored at."""
        return set.intersection(*({row["n_edits"] for row in run.scored} for run in self.runs.values()))

    def rows(self, n_edits: int) -> list[dict[str, Any]]:
        """Each run's row of the summary at this number of edits."""
        return [next(row for row in run.scored if row["n_edits"] == n_edits) for run in self.runs.values()]


def boards(runs: Sequence[RunData], reference: str | None = None) -> list[Board]:
    """The comparisons that these runs make; none where there are but a method's runs with one seed.

    Args:
        reference: label of the configuration that each other one of its model and facts is compared with; None: the
            first of each.

    Returns:
        JSON-able, one board per model and set of facts: {"model", "dataset", "kind", "unedited" (the model's row of the
        summary, or None), "configurations": a list of {"label", "folders" (by seed), "n_edits" (the last that all its
        runs were scored at), "metrics" (`summarise_seeds`), "text_perplexity", "weights", "seconds_per_edit" (means of
        the runs)}, "differences": as `sphere.report.pairs.compare` returns them, at the last number of edits of both}.

    Raises:
        SphereError: no configuration has that label.
    """
    found = []
    for same in _on_the_same_facts(runs):
        configurations = _configurations(same)
        several = len(configurations) > 1 and len({c.first.method for c in configurations}) > 1
        if several or any(len(c.runs) > 1 for c in configurations):
            found.append(_board(configurations, reference))
    known = [c["label"] for board in found for c in board["configurations"]]
    if reference is not None and reference not in known:
        raise SphereError(
            f"No configuration '{reference}' is compared here: use one of {', '.join(dict.fromkeys(known)) or 'none'}.",
            argument="reference",
        )
    return found


def _on_the_same_facts(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Scored runs of one model that edited the same facts, in whatever order."""
    groups: list[tuple[str, list[Case], list[RunData]]] = []  # with the cases of the first
    for run in runs:
        if not run.described or not (cases := _cases(run)):
            continue
        facts = [run.config.get(key) for key in ("model", "ds_name", "facts", "user_turn")]
        key = json.dumps([*facts, run.kind, sorted(run.config.get("case_ids", []))])
        group = next((group for its, first, group in groups if its == key and agree(first, cases)), None)
        if group is None:
            groups.append((key, cases, [run]))
        else:
            group.append(run)
    return [group for *_, group in groups]


def _configurations(runs: Sequence[RunData]) -> list[Configuration]:
    """Runs that differ in their seed only; a seed that occurs again begins another configuration."""
    found: dict[str, dict[int, RunData]] = {}
    for run in runs:
        keys = [key for key in (*DECIDED, *HOOK, "shuffle") if key not in OF_A_SEED]
        name = json.dumps([run.config.get("hparams"), *(run.config.get(key) for key in keys)], sort_keys=True)
        seed = int(run.config.get("seed", 0))
        while seed in found.get(name, {}):
            name += " again"
        found.setdefault(name, {})[seed] = run
    chosen = [dict(sorted(by_seed.items())) for by_seed in found.values()]
    names = labels([next(iter(by_seed.values())) for by_seed in chosen])
    made = [Configuration(name, by_seed) for name, by_seed in zip(names, chosen, strict=True)]
    return [configuration for configuration in made if configuration.n_edits]


def _cases(run: RunData) -> list[Case]:
    """The cases that the last checkpoint's scores are of, where they are there."""
    return scored_cases(run, run.scored[-1]["n_edits"]) if run.scored else []


def _board(configurations: Sequence[Configuration], reference: str | None) -> Board:
    first = configurations[0].first
    pairs = [_difference(one, other) for one, other in _compared(configurations, reference)]
    return {
        "model": first.model,
        "dataset": str(first.config.get("ds_name", "unknown data")),
        "kind": first.kind,
        "unedited": next((row for row in first.rows if not row["n_edits"]), None),
        "configurations": [_described(configuration) for configuration in configurations],
        "differences": [pair for pair in pairs if pair],
    }


def _described(configuration: Configuration) -> dict[str, Any]:
    """A configuration at its last number of edits: metrics over all seeds, the state's numbers as means of the runs."""
    n_edits = configuration.n_edits or 0
    rows = configuration.rows(n_edits)
    return {
        "label": configuration.label,
        "folders": {str(seed): str(run.folder) for seed, run in configuration.runs.items()},
        "n_edits": n_edits,
        "metrics": summarise_seeds([scored_cases(run, n_edits) for run in configuration.runs.values()]),
        "text_perplexity": _mean([row.get("text_perplexity") for row in rows]),
        "weights": {
            key: _mean([(row.get("weights") or {}).get(key) for row in rows])
            for key in ("energy_change", "rotation", "change_norm")
        },
        "seconds_per_edit": _mean([_seconds_per_edit(run) for run in configuration.runs.values()]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _seconds_per_edit(run: RunData) -> float | None:
    seconds = [batch["seconds"] for batch in run.batches if "seconds" in batch]
    return sum(seconds) / run.batches[-1]["n_edits"] if seconds else None


def _compared(
    configurations: Sequence[Configuration], reference: str | None
) -> list[tuple[Configuration, Configuration]]:
    """(reference, other): the reference and each other one; the plain one of a method and each other one of it."""
    chosen = next((c for c in configurations if c.label == reference), configurations[0])
    plain = {c.first.method: c for c in reversed(configurations) if is_plain(c.first)}
    found = [(chosen, c) for c in configurations if c is not chosen]
    found += [
        (own, c)
        for c in configurations
        if (own := plain.get(c.first.method)) and own is not c and own is not chosen and c is not chosen
    ]
    return found


def _difference(reference: Configuration, other: Configuration) -> Pair | None:
    """Other minus reference over the seeds and facts of both; None where they have none in common."""
    seeds = [seed for seed in reference.runs if seed in other.runs]
    common = reference.common_edits & other.common_edits
    if not seeds or not common:
        return None
    n_edits = max(common)
    first, second = ([scored_cases(one.runs[seed], n_edits) for seed in seeds] for one in (reference, other))
    if not all((*first, *second)):
        return None
    ends = {
        name: {"label": one.label, "folders": [str(one.runs[seed].folder) for seed in seeds]}
        for name, one in (("reference", reference), ("run", other))
    }
    row = {"n_edits": n_edits, "seeds": seeds, **differences_over_seeds(first, second)}
    return {**ends, "kind": other.first.kind, "differences": [row]}


def comparison_lines(board: Board) -> list[list[str]]:
    """The one table of a board, the first line its head."""
    unedited = [board["unedited"] | {"label": "unedited model"}] if board["unedited"] else []
    head, *lines = table_lines([*unedited, *(c | {"extra": _extra(c)} for c in board["configurations"])])
    return [["configuration", *head[1:]], *lines]


def _extra(configuration: Mapping[str, Any]) -> dict[str, str]:
    spread = (configuration["metrics"].get("score") or {}).get("seed_std")
    seconds = configuration["seconds_per_edit"]
    return {
        "seeds": str(len(configuration["folders"])),
        "between seeds": "-" if spread is None else f"± {spread:.1f}",
        "s/edit": "-" if seconds is None else f"{seconds:.2f}",
    }


def difference_lines(board: Board) -> list[list[str]]:
    """Its paired differences, the first line the head."""
    return paired_lines(board["differences"], board["kind"])


def suffix_of(board: Board, boards: Sequence[Board]) -> str:
    """What a title says of the board where there are several."""
    return "" if len(boards) == 1 else f" ({board['model']} {board['dataset']})"


def file_suffix(board: Board, boards: Sequence[Board]) -> str:
    """The same in a file's name."""
    return "".join(c if c.isalnum() else "_" for c in slug(suffix_of(board, boards)))


def comparison_text(boards: Sequence[Board]) -> str:
    """All boards for the terminal."""
    parts = []
    for board in boards:
        title = f"{board['model']}, {board['dataset']}: means over facts and seeds, 95 % intervals:"
        parts += [title, format_lines(comparison_lines(board))]
        if board["differences"]:
            parts += ["Paired differences in percentage points, 95 % intervals:"]
            parts += [format_lines(difference_lines(board))]
    return "\n\n".join(parts)
