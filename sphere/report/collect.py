"""Read what runs have left on disk into one shape, and measure their checkpoints where the log has no figures.

Knows files and their formats. Knows nothing of figures or pages. Models are not loaded: energies and cosines come
from the weights that the checkpoints hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sphere.checkpoints import (
    LOG_NAME,
    Checkpoint,
    list_checkpoints,
    logged_energy_changes,
    read_config,
    read_log,
    read_weights,
)
from sphere.downstream.runner import FOLDER as DOWNSTREAM_FOLDER
from sphere.downstream.runner import SUMMARY as DOWNSTREAM_SUMMARY
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import FOLDER as SUMMARY_FOLDER
from sphere.evaluation.evaluate_run import SUMMARY_NAME
from sphere.files import read_json
from sphere.hypersphere import cosine_distribution, hyperspherical_energy
from sphere.runs.guard_log import read_guard
from sphere.runs.resolve import chain_of, has_sphere
from sphere.strength import in_words

BINS = 4000  # of a cosine histogram over [-1, 1]
PUBLISHED_FOLDER = re.compile(r"(?P<ds>.+)_weight_data_batch_(?P<n>\d+)_(?P<beta>[\d.]+)_(?P<alpha>[\d.]+)")

Histogram = dict[str, Any]


@dataclass
class RunData:
    """One run.

    Attributes:
        config: `run.json`; for a run without one (published .pth files) what the folder's name says.
        described: whether there is a `run.json`.
        checkpoints: by number of edits; [] where the weights of a scored run have been removed.
        batches: lines of the editing log, in order.
        summary: `summary/summary.json`, or None.
        downstream: `rect_eval/summary.json`, or None.
        guard: lines of the guard's log, in order.
        label: how figures and tables call the run; distinct among the runs of a report.
        energy_changes: number of edits -> weight name -> relative change of the energy against the unedited weight.
        cosines: number of edits -> histogram of neuron cosines, all edited weights together; of the unedited and the
            last checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    described: bool
    checkpoints: list[Checkpoint]
    batches: list[dict[str, Any]]
    summary: dict[str, Any] | None
    downstream: dict[str, Any] | None
    guard: list[dict[str, Any]] = field(default_factory=list)
    label: str = ""
    energy_changes: dict[int, dict[str, float]] = field(default_factory=dict)
    cosines: dict[int, Histogram] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.config.get("alg_name", "unknown method"))

    @property
    def has_sphere(self) -> bool:
        return has_sphere(self.config)

    @property
    def kind(self) -> str | None:
        """Kind of the scored records ("counterfact", "zsre"), None where nothing is scored."""
        return self.rows[0]["metrics"]["kind"] if self.rows else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Scored states, the unedited model first; [] where nothing is scored."""
        return self.summary["checkpoints"] if self.summary else []

    @property
    def scored(self) -> list[dict[str, Any]]:
        """Rows of the scored checkpoints, without the unedited model's."""
        return [row for row in self.rows if row["n_edits"]]

    @property
    def n_edits(self) -> int:
        """Edits up to the last checkpoint, or up to the last scored one where its weights are gone."""
        states = [checkpoint.n_edits for checkpoint in self.checkpoints] + [r["n_edits"] for r in self.rows]
        return max(states)

    @property
    def scored_edits(self) -> int:
        """Edits up to the last checkpoint that is scored, which need not be the last one; 0 where none is."""
        return self.scored[-1]["n_edits"] if self.scored else 0

    @property
    def has_original(self) -> bool:
        """Whether the unedited weights are at hand."""
        return bool(self.checkpoints) and self.checkpoints[0].n_edits == 0

    @property
    def model(self) -> str:
        """The model's name without its folder."""
        return str(self.config.get("model_name", "unknown model")).rstrip("/").rpartition("/")[2]


def load_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Runs with distinct labels; a folder given twice counts once.

    Raises:
        SphereError: a folder without checkpoints or scores, or a file in it that is not what it should be.
    """
    runs = [
        load_run(folder) for folder in {Path(folder).resolve(): Path(folder) for folder in folders}.values()
    ]
    for run, label in zip(runs, labels(runs), strict=True):
        run.label = label
    return runs


def load_run(folder: Path) -> RunData:
    """One run, without label and measurements."""
    summary = _optional(folder / SUMMARY_FOLDER / SUMMARY_NAME, "summary of scores")
    try:
        checkpoints = list_checkpoints(folder)
    except SphereError:
        if summary is None:
            raise
        checkpoints = []  # large, and no longer needed once they are scored
    config = read_config(folder)
    if summary is not None:
        _check_summary(summary, folder)
    downstream = _optional(folder / DOWNSTREAM_FOLDER / DOWNSTREAM_SUMMARY, "downstream summary")
    if downstream is not None and not isinstance(downstream.get("checkpoints"), dict):
        raise SphereError(_remake(folder / DOWNSTREAM_FOLDER, "downstream summary"))
    return RunData(
        folder,
        config or _config_from_name(folder),
        bool(config),
        checkpoints,
        read_log(folder / LOG_NAME),
        summary,
        downstream,
        read_guard(folder),
    )


def _optional(path: Path, what: str) -> dict[str, Any] | None:
    content = read_json(path, what) if path.exists() else None
    if content is not None and not isinstance(content, dict):
        raise SphereError(_remake(path.parent, what))
    return content


def _check_summary(summary: Mapping[str, Any], folder: Path) -> None:
    try:
        good = all(
            isinstance(row["n_edits"], int) and row["metrics"]["kind"] and "score" in row["metrics"]
            for row in summary["checkpoints"]
        )
    except (KeyError, TypeError):
        good = False
    if not good or not summary["checkpoints"]:
        raise SphereError(_remake(folder / SUMMARY_FOLDER, "summary of scores"))


def _remake(folder: Path, what: str) -> str:
    return f"The {what} in {folder} is not as `sphere score` writes it: remove it and score again."


def _config_from_name(folder: Path) -> dict[str, Any]:
    """What <alg>/<model>/<dataset>_weight_data_batch_<n>_<beta>_<alpha> says; nothing for another name."""
    place = folder.resolve()
    match = PUBLISHED_FOLDER.fullmatch(place.name)
    if not match:
        return {}
    return {
        "alg_name": place.parent.parent.name,
        "model_name": place.parent.name,
        "ds_name": match["ds"],
        "num_edits": int(match["n"]),
        "beta_hse": float(match["beta"]),
        "alpha": float(match["alpha"]),
    }


SETTINGS: dict[
    str, Callable[[RunData], str]
] = {  # what may tell two runs of a method apart, most telling first
    "model_name": lambda run: run.model,
    "ds_name": lambda run: str(run.config.get("ds_name", "?")),
    "beta_hse": lambda run: f"β {in_words(run.config['beta_hse'])}" if run.has_sphere else "",
    "alpha": lambda run: f"α {in_words(run.config['alpha'])}" if run.has_sphere else "",
    "alpha_budget": lambda run: (
        "" if run.config.get("alpha_budget") is None else f"budget {run.config['alpha_budget']:g}"
    ),
    "rules": lambda run: (
        "" if (chain := chain_of(run.config)) is None else f"rules {','.join(chain) or 'none'}"
    ),
    "directions": lambda run: (
        "" if run.config.get("directions", "current") == "current" else "original directions"
    ),
    "num_edits": lambda run: f"batches of {run.config.get('num_edits', '?')}",
    "seed": lambda run: f"seed {run.config.get('seed', '?')}",
}


def labels(runs: Sequence[RunData]) -> list[str]:
    """Method and SPHERE; where several runs share these, also the settings that tell them apart, or the folder."""
    result = [run.method + (" + SPHERE" if run.has_sphere else "") for run in runs]
    for name in dict.fromkeys(result):
        same = [i for i, label in enumerate(result) if label == name]
        if len(same) == 1:
            continue
        for show in SETTINGS.values():
            longer = {i: ", ".join(filter(None, (result[i], show(runs[i])))) for i in same}
            if len(set(longer.values())) > len({result[i] for i in same}):
                for i in same:
                    result[i] = longer[i]
        if len({result[i] for i in same}) < len(same):
            for i in same:
                result[i] += f" ({runs[i].folder})"
    return result


# ---- measurements ----


def measure(runs: Sequence[RunData], progress: bool = True) -> None:
    """Fill in energy changes (logged, scored, or of the checkpoints), and cosines of the first and the last one."""
    cache: dict[tuple[Any, ...], Any] = {}  # runs of one model share their unedited weights
    steps = [(run, checkpoint) for run in runs for checkpoint in run.checkpoints]
    for run in runs:
        run.energy_changes = scored_changes(run.scored) | logged_energy_changes(run.batches)
    bar = tqdm(steps, desc="measuring", unit="checkpoint", disable=not progress)
    for run, checkpoint in bar:
        ends = (run.checkpoints[0], run.checkpoints[-1]) if run.has_original else ()
        lacking = run.has_original and checkpoint.n_edits not in run.energy_changes and checkpoint.n_edits
        if not lacking and checkpoint not in ends:
            continue
        weights = _Weights(run, checkpoint, cache)
        if lacking:
            original = _Weights(run, run.checkpoints[0], cache).energies
            energies = weights.energies
            run.energy_changes[checkpoint.n_edits] = {
                name: (energies[name] - energy) / abs(energy) for name, energy in original.items() if energy
            }
        if checkpoint in ends:
            run.cosines[checkpoint.n_edits] = weights.cosines
    for run in runs:
        run.energy_changes = dict(sorted(run.energy_changes.items()))


def scored_changes(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The same of the checkpoints that were scored, by rows of their summary."""
    layers = {row["n_edits"]: (row.get("weights") or {}).get("layers", {}) for row in rows}
    changes = {
        n_edits: {n: f["energy_change"] for n, f in found.items() if f["energy_change"] is not None}
        for n_edits, found in layers.items()
    }
    return {n_edits: found for n_edits, found in changes.items() if found}


class _Weights:
    """Figures of one checkpoint's weights, each found when asked for and then kept in `cache`."""

    def __init__(self, run: RunData, checkpoint: Checkpoint, cache: dict[tuple[Any, ...], Any]) -> None:
        self.path = checkpoint.path
        self.transposed = set(run.config.get("transposed", ()))
        self.cache = cache
        # The unedited layers of one model are the same, in whichever run's folder.
        model, hparams = run.config.get("model"), run.config.get("hparams", {})
        same = (model, str(hparams.get("layers")), hparams.get("rewrite_module_tmp"))
        self.key = same if model and checkpoint.n_edits == 0 else (str(self.path.resolve()),)

    @property
    def energies(self) -> dict[str, float]:
        return self._cached("energies", lambda ws: {n: hyperspherical_energy(w) for n, w in ws.items()})

    @property
    def cosines(self) -> Histogram:
        return self._cached("cosines", lambda ws: pooled([cosine_distribution(w, BINS) for w in ws.values()]))

    def _cached(self, what: str, make: Any) -> Any:
        key = (what, *self.key)
        if key not in self.cache:
            self.cache[key] = make(self._neurons())
        return self.cache[key]

    def _neurons(self) -> dict[str, Tensor]:
        """The weights as (out x in)."""
        weights = read_weights(self.path)
        return {name: w.T if name in self.transposed else w for name, w in weights.items()}


def pooled(histograms: Sequence[Histogram]) -> Histogram:
    """Several histograms over the same edges as one; mean and standard deviation over all pairs."""
    pairs = sum(h["pairs"] for h in histograms)
    mean = sum(h["pairs"] * h["mean"] for h in histograms) / pairs
    square = sum(h["pairs"] * (h["std"] ** 2 + h["mean"] ** 2) for h in histograms) / pairs
    return {
        "edges": histograms[0]["edges"],
        "counts": [sum(counts) for counts in zip(*(h["counts"] for h in histograms), strict=True)],
        "mean": mean,
        "std": max(square - mean**2, 0.0) ** 0.5,
        "pairs": pairs,
    }
