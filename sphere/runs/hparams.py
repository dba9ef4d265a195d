"""The hyperparameters of a run: those of its file, or its method's defaults for a model that has none.

Every command that needs hyperparameters asks here. Knows files and configurations; loads no weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphere.defaults import default_hparams, defaults_path
from sphere.errors import SphereError
from sphere.files import atomic_path
from sphere.hparams import ModuleHParams, load_hparams
from sphere.methods import get_method
from sphere.methods.chosen_rules import chosen_rules
from sphere.models import meta_model, model_label
from sphere.resources import find
from sphere.rules import RuleSet
from sphere.runs.config import RunConfig
from sphere.runs.resolve import alpha_budget_of, alpha_of, beta_hse_of, hparams_path, rules_of

log = logging.getLogger(__name__)


def hparams_of(config: RunConfig) -> ModuleHParams:
    """The hyperparameters of a run.

    Where `hparams_fname` is not given and there is no file of the model's name, the method's defaults, with the modules
    that are found in the model (`sphere.defaults`).

    Raises:
        SphereError: a file that was asked for and is not there or not sound, or a model without modules to edit.
    """
    method, path = get_method(config.alg_name), hparams_path(config)
    if hparams_source(config) == path:
        return load_hparams(path, method.hparams_class)
    hparams = default_hparams(meta_model(config.model_name), method, config.hparams_dir)
    if near := _of_a_name_that_begins_it(path):
        log.info("%s is for a model whose name is the beginning of this one's: --hparams_fname=%s", *near)
    return hparams


def run_rules(config: RunConfig, hparams: ModuleHParams) -> RuleSet:
    """The update rules of a run.

    Raises:
        SphereError: an unknown rule, or a number out of its range.
    """
    return chosen_rules(
        get_method(config.alg_name),
        hparams,
        rules=rules_of(config),
        beta_hse=beta_hse_of(config),
        alpha=alpha_of(config),
        alpha_budget=alpha_budget_of(config),
        directions=config.directions,
        revive_tau=config.revive_tau,
        seed=config.seed,
    )


def hparams_source(config: RunConfig) -> Path:
    """The file that a run's numbers are from: its own, or its method's defaults."""
    path = hparams_path(config)
    named = config.hparams_fname is not None or not find(config.hparams_dir).is_dir()
    if path.exists() or named:
        return path
    return defaults_path(config.alg_name, config.hparams_dir) or path


def _of_a_name_that_begins_it(path: Path) -> tuple[Path, str] | None:
    """A hyperparameter file beside `path` whose name is the longest beginning of its name, e.g. without "-Instruct"."""
    folder = find(path.parent)
    begins = [file for file in folder.glob("*.json") if path.stem.lower().startswith(file.stem.lower())]
    nearest = max(begins, key=lambda file: len(file.stem), default=None)
    return (nearest, nearest.name) if nearest else None


def write_path(config: RunConfig) -> Path:
    """Where a hyperparameter file for a run's model belongs: in its own `hparams_dir`, not among what is shipped."""
    file = config.hparams_fname or f"{model_label(config.model_name)}.json"
    return Path(config.hparams_dir) / config.alg_name / file


def format_hparams(model_name: str, values: Mapping[str, Any]) -> str:
    """The text of a hyperparameter file, a key per line."""
    content = {"model_name": model_label(model_name), **values}
    lines = [f"    {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_hparams(config: RunConfig, hparams: ModuleHParams, overwrite: bool = False) -> Path:
    """Write hyperparameters as the file that runs of this model and method read; returns its path.

    Raises:
        SphereError: there is a file, one's own or a shipped one, and it is not to be overwritten.
    """
    path = write_path(config)
    if not overwrite and (there := find(path)).exists():
        raise SphereError(
            f"There is a hyperparameter file for this model and method at {there}: overwrite it, or give another name.",
            argument=("overwrite", "hparams_fname"),
        )
    with atomic_path(path) as temporary:
        temporary.write_text(format_hparams(config.model_name, hparams.to_dict()), "utf-8")
    return path
