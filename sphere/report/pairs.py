"""Which runs are compared fact by fact, and the differences of their scores.

Runs that edited the same facts in the same order, and that differ in nothing but the hook and the rules, are compared
with the plain one among them. Knows `RunData` and the scored cases on disk. Knows nothing of figures or pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere.checkpoints import USER_TURN
from sphere.errors import SphereError
from sphere.evaluation.case_file import read_cases
from sphere.evaluation.evaluate_run import FOLDER
from sphere.evaluation.paired import paired_differences
from sphere.evaluation.scoring import Case, compare_predictions
from sphere.evaluation.summary import COLUMNS, GENERATION
from sphere.report.collect import RunData
from sphere.runs.resolve import chain_of

UNITS = "run minus reference, in percentage points, fluency in bits; intervals: percentile bootstrap over facts, 95 %"
# What a run is decided by beside the hook and the rules; see `sphere.runs.run`.
DECIDED = (
    "alg_name",
    "ds_name",
    "case_ids",
    "requests",
    "num_edits",
    "seed",
    "z_matmul_dtype",
    USER_TURN,
    "model",
    "model_dtype",
)
Pair = dict[str, Any]


def compare(runs: Sequence[RunData], against: Path | None = None) -> list[Pair]:
    """Paired differences of all runs that can be compared, at every number of edits that both were scored at.

    Args:
        runs: with labels.
        against: folder of the run that all others are compared with; None: see `references`.

    Returns:
        JSON-able, one entry per pair: {"reference", "run" (each {"label", "folder"}), "kind", "differences": a list of
        {"n_edits", and what `paired_differences` returns}}; pairs without common scores are left out.

    Raises:
        SphereError: a run that has nothing in common with `against`.
    """
    if against is None:
        chosen = references(runs)
    else:
        (reference,) = (run for run in runs if run.folder.resolve() == against.resolve())
        chosen = [(reference, run) for run in runs if run is not reference]
    pairs = []
    for reference, run in chosen:
        differences = _differences(reference, run)
        if differences:
            ends = {
                n: {"label": r.label, "folder": str(r.folder)}
                for n, r in (("reference", reference), ("run", run))
            }
            pairs.append({**ends, "kind": run.kind, "differences": differences})
        elif against is not None:
            raise SphereError(
                f"{run.folder} has no scored cases in common with {reference.folder}: score both on the same dataset, "
                "with checkpoints at the same number of edits.",
                argument="against",
            )
    return pairs


def references(runs: Sequence[RunData]) -> list[tuple[RunData, RunData]]:
    """(reference, run): of runs with the same settings but for the hook and the rules, the plain one and each other.

    Where none is plain, the first one is the reference.
    """
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if run.described and run.scored:
            groups.setdefault(_decided(run.config), []).append(run)
    found = []
    for group in groups.values():
        reference = next((run for run in group if is_plain(run)), group[0])
        found += [(reference, run) for run in group if run is not reference]
    return found


def _decided(config: Mapping[str, Any]) -> str:
    hparams = {key: value for key, value in config.get("hparams", {}).items() if key != "rules"}
    return json.dumps([hparams, *(config.get(key) for key in DECIDED)], sort_keys=True)


def is_plain(run: RunData) -> bool:
    """The method as it is published, without SPHERE."""
    return not run.config.get("beta_hse") and chain_of(run.config) is None


def _differences(reference: RunData, run: RunData) -> list[dict[str, Any]]:
    if reference.kind != run.kind or reference.config.get("ds_name") != run.config.get("ds_name"):
        return []
    common = {row["n_edits"] for row in reference.scored} & {row["n_edits"] for row in run.scored}
    found = []
    for n_edits in sorted(common):
        cases = same_facts(scored_cases(reference, n_edits), scored_cases(run, n_edits))
        if cases[0]:
            found.append({"n_edits": n_edits, **paired_differences(*cases)})
    return found


def same_facts(first: Sequence[Case], second: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """The cases of the facts that both have: two tables may give one case_id to different facts."""
    facts = [{case["case_id"]: _fact(case) for case in cases} for cases in (first, second)]
    common = {i for i, fact in facts[0].items() if facts[1].get(i) == fact}
    return [c for c in first if c["case_id"] in common], [c for c in second if c["case_id"] in common]


def agree(first: Sequence[Case], second: Sequence[Case]) -> bool:
    """Whether no case_id stands for different facts in them."""
    common = {case["case_id"] for case in first} & {case["case_id"] for case in second}
    return len(same_facts(first, second)[0]) == len(common)


def _fact(case: Case) -> tuple[str | None, ...]:
    rewrite = [entry.get("prompt") for entry in case["rewrite"]]
    return case.get("subject"), case.get("target_new"), *rewrite


def scored_cases(run: RunData, n_edits: int) -> list[Case]:
    """The cases of a checkpoint, [] where not all of them are there; text counts where the summary counts it."""
    folder, summary = run.folder / FOLDER, run.summary or {}
    cases = read_cases(folder / f"cases_edit_{n_edits}.jsonl")
    if len(cases) != min(n_edits, summary.get("scored_facts") or n_edits):
        return []
    unedited = read_cases(folder / "cases_edit_0.jsonl")
    if {case["case_id"] for case in cases} <= {case["case_id"] for case in unedited}:
        compare_predictions(cases, unedited)
    asked = {  # files of earlier versions hold text of other scorings beside what counts
        "generation": summary.get("generation_interval"),
        "greedy": summary.get("exact_match_facts"),
        "answers": summary.get("generated_facts"),
    }
    unasked = {key for key, count in asked.items() if not count}
    return [{key: value for key, value in case.items() if key not in unasked} for case in cases]


def paired_lines(pairs: Sequence[Pair], kind: str, last: bool = False) -> list[list[str]]:
    """A table of the pairs of one kind as cells, the first line its head.

    Args:
        last: only the largest number of edits of each pair.
    """
    chosen = [pair for pair in pairs if pair["kind"] == kind]
    rows = [(pair, row) for pair in chosen for row in pair["differences"][-1 if last else 0 :]]
    columns = {title: key for title, key in COLUMNS[kind].items() if any(key in row for _, row in rows)}
    columns = {title: key for title, key in columns.items() if key not in GENERATION}
    seeds = ["seeds"] if any("seeds" in row for _, row in rows) else []
    lines = [["run", "minus", *seeds, "edits", "facts", *columns]]
    for pair, row in rows:
        ends = pair["run"]["label"], pair["reference"]["label"]
        cells = [_cell(row.get(key)) for key in columns.values()]
        own = [str(len(row["seeds"]))] if seeds else []
        lines.append([*ends, *own, str(row["n_edits"]), str(row["n_cases"]), *cells])
    return lines


def _cell(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['difference']:+.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"
