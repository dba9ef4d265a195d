"""A job of a sweep: one run, where it lands, and how it is scored.

Knows names and paths. Loads no model, writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sphere.errors import SphereError
from sphere.evaluation.scored_facts import check_scored_facts
from sphere.files import read_json
from sphere.hparams import read_content
from sphere.renamed import by_new_names
from sphere.runs.config import RunConfig, limit_by_default
from sphere.runs.hparams import hparams_source
from sphere.runs.resolve import folder_of, sphere_numbers

# What a run's folder does not say by itself goes into the folder above it.
UNNAMED = ("dataset_size_limit", "hparams_fname", "dtype", "z_matmul_dtype")


@dataclass(frozen=True)
class Job:
    """One run of a sweep and how it is scored.

    Attributes:
        config: the run; its `output_dir` is the sweep's folder.
        generation_interval: generate text for every so-many-th case; 0: never.
        exact_match_facts: generate greedy text of so many facts, from the first; 0: none.
        generated_facts: ask about so many facts as a user does, from the first; 0: about none.
        scored_facts: score at most so many of the facts edited so far, drawn by the seed; 0: all.
    """

    config: RunConfig
    generation_interval: int = 0
    exact_match_facts: int = 0
    generated_facts: int = 0
    scored_facts: int = 0

    def __post_init__(self) -> None:
        text = self.generation_interval > 0 or self.exact_match_facts or self.generated_facts
        check_scored_facts(self.scored_facts, bool(text))

    @property
    def run_config(self) -> RunConfig:
        """The run as it is executed: in a folder that no other job has."""
        parts = [f"seed_{self.config.seed}"]
        defaults = {"dataset_size_limit": limit_by_default(self.config.facts)}
        for key in UNNAMED:
            value = getattr(self.config, key)
            if value != defaults.get(key, getattr(RunConfig, key)):
                parts.append(f"{key}_{Path(str(value)).stem}")
        return replace(self.config, output_dir=str(Path(self.config.output_dir) / "_".join(parts)))

    @property
    def folder(self) -> Path:
        """Where the run lands."""
        return folder_of(self.run_config)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able: the run's configuration with its hyperparameters, and how it is scored."""
        path = hparams_source(self.config)
        hparams = read_content(path) if path.exists() else None
        numbers = {"alpha_budget": None, **sphere_numbers(self.config)}
        scoring = {name: getattr(self, name) for name in SCORING}
        return {**asdict(self.run_config), **numbers, **scoring, "hparams": hparams}


def check_folders(jobs: Iterable[Job]) -> None:
    """Refuse different jobs in one folder: the second would go on with the run of the first, and take its place.

    Raises:
        SphereError: two such jobs; it says in which settings they differ.
    """
    first: dict[Path, Job] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job)
        if other is job:
            continue
        both = other.settings, job.settings
        differing = [key for key in both[0] if key != "hparams" and both[0][key] != both[1][key]]
        if differing:
            one, two = (in_words(settings, differing) for settings in both)
            raise SphereError(
                f"The jobs with {one} and with {two} would both be the run in {job.folder}: begin a sweep for each, "
                "with a sweep_dir of its own.",
                argument="sweep_dir",
            )


def in_words(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """Some settings as a command spells them."""
    values = {name: settings[name] for name in names}
    return ", ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())


def read_job(path: Path) -> dict[str, Any]:
    """What became of a job, its settings by the names that they have now."""
    job: dict[str, Any] = read_json(path, "job")
    if not {"status", "settings"} <= job.keys():
        raise SphereError(
            f"{path} was not written by a sweep: move it, or choose another folder.", argument="sweep_dir"
        )
    return job | {"settings": by_new_names(job["settings"])}


# How a job is scored -> its default.
SCORING: dict[str, Any] = {one.name: one.default for one in fields(Job) if one.name != "config"}
