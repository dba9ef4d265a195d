"""What a run's settings come to: its hyperparameter file, its hook's numbers and rules, its folder.

Knows names and paths, and is imported without PyTorch. Loads no model, writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from sphere.errors import SphereError
from sphere.resources import find
from sphere.runs.config import BETA_HSE, OWN_FACTS, RunConfig
from sphere.strength import ALPHA_BUDGET, AUTO, OrAuto


def hparams_path(config: RunConfig) -> Path:
    """The hyperparameter file of a run: in its `hparams_dir`, else among those that are shipped."""
    from sphere.models import model_label

    file = config.hparams_fname or f"{model_label(config.model_name)}.json"
    return find(Path(config.hparams_dir) / config.alg_name / file)


def rules_of(config: RunConfig) -> list[str] | None:
    """The names of a run's update rules; None: the method's own."""
    return _names(config.rules)


def _names(rules: str | None) -> list[str] | None:
    return None if rules is None else [name.strip() for name in rules.split(",") if name.strip()]


def chain_of(stored: Mapping[str, Any]) -> list[str] | None:
    """The names of a run's update rules by its `run.json`, or by a job's settings; None: the method's own.

    What `rules` says goes before the hyperparameters, as in `sphere.methods.chosen_rules`.
    """
    given = _names(stored.get("rules"))
    of_its_file = (stored.get("hparams") or {}).get("rules")
    return (list(of_its_file or ()) or None) if given is None else given


def has_sphere(stored: Mapping[str, Any]) -> bool:
    """Whether a run's updates pass the SPHERE hook, by the same; every method's own rules have it."""
    chain = chain_of(stored)
    return bool(stored.get("beta_hse")) and (chain is None or "sphere" in chain)


def folder_of(config: RunConfig) -> Path:
    """Where a run lands; rules that are not the published ones, another order and a chat template are in its name."""
    from sphere.checkpoints import run_folder
    from sphere.models import model_label

    folder = run_folder(
        config.output_dir,
        config.alg_name,
        model_label(config.model_name),
        data_label(config),
        config.num_edits,
        beta_hse_of(config),
        alpha_of(config),
    )
    names = rules_of(config)
    more = [] if names is None else ["+".join(names) or "no_rules"]
    if config.directions != RunConfig.directions:
        more.append(f"{config.directions}_directions")
    if config.project != RunConfig.project:
        more.append(f"project_{config.project}")
    if (budget := sphere_numbers(config).get("alpha_budget", ALPHA_BUDGET)) != ALPHA_BUDGET:
        more.append(f"budget_{budget:g}")
    if config.revive_tau != RunConfig.revive_tau:
        more.append(f"tau_{config.revive_tau:g}")
    if config.shuffle:
        more.append(f"shuffled_{config.seed}")
    if config.chat_template:
        more.append("chat")
    return folder.with_name("_".join([folder.name, *more]))


def data_label(config: RunConfig) -> str:
    """What a run's folder calls its data: the dataset, or the name of a table of one's own."""
    if config.facts is None:
        return config.ds_name
    name = re.sub(r"[^\w.-]+", "_", Path(config.facts).stem).strip("_.-")
    return name or OWN_FACTS


def beta_hse_of(config: RunConfig) -> OrAuto:
    """A run's cumulative ratio, or "auto": its own, or what its hyperparameter file says, or the paper's."""
    if config.beta_hse is not None:
        return config.beta_hse
    return _of_its_file(config).get("beta_hse", BETA_HSE)


def alpha_of(config: RunConfig) -> OrAuto:
    """A run's suppression strength, or "auto": its own, or what its hyperparameter file says, or its method's."""
    from sphere.methods import get_method

    if config.alpha is not None:
        return config.alpha
    return _of_its_file(config).get("alpha", get_method(config.alg_name).default_alpha)


def alpha_budget_of(config: RunConfig) -> float:
    """What `alpha` "auto" may change: a run's own, or what its hyperparameter file says, or the default."""
    if config.alpha_budget is not None:
        return config.alpha_budget
    return float(_of_its_file(config).get("alpha_budget", ALPHA_BUDGET))


def sphere_numbers(config: RunConfig) -> dict[str, OrAuto]:
    """What decides a run's SPHERE: beta_hse and alpha, and alpha's budget where it has one."""
    budget = {"alpha_budget": alpha_budget_of(config)} if alpha_of(config) == AUTO else {}
    return {"beta_hse": beta_hse_of(config), "alpha": alpha_of(config), **budget}


def _of_its_file(config: RunConfig) -> dict[str, OrAuto]:
    """What a run's hyperparameter file says of SPHERE; nothing where it cannot be read, which is said elsewhere."""
    from sphere.hparams import read_content
    from sphere.methods import get_method
    from sphere.peer_hparams import sphere_settings

    path = hparams_path(config)
    with suppress(SphereError):
        if path.exists():
            known = {field.name for field in fields(get_method(config.alg_name).hparams_class)}
            return sphere_settings(read_content(path), known)
    return {}
