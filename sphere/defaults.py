"""Hyperparameters for a model that nobody has written a file for: its method's defaults, and modules found in it.

The defaults, `hparams/defaults/<method>.json`, are the keys of the method's files without module templates; `layers`
says where in the depth of a model they begin and how many they are. They are not tuned for the model.
"""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sphere.errors import SphereError
from sphere.files import read_json
from sphere.forward.module_templates import ModuleTemplates, module_templates
from sphere.hparams import ModuleHParams, hparams_from_dict
from sphere.methods import Method, get_method
from sphere.resources import find, shipped

log = logging.getLogger(__name__)

FOLDER = "defaults"


def default_hparams(
    model: nn.Module, method: str | type[Method], hparams_dir: str | Path = "hparams"
) -> ModuleHParams:
    """A method's default hyperparameters for a model; untuned, and a log line says so.

    Args:
        model: a causal language model of transformers; on the meta device it will do.
        hparams_dir: its `defaults/<method>.json` goes before the one that is shipped.

    Raises:
        SphereError: a model without modules to edit, or a method without defaults.
    """
    method = get_method(method) if isinstance(method, str) else method
    path = defaults_path(method.name, hparams_dir)
    if path is None:
        raise SphereError(
            f"There are no default hyperparameters for {method.name}: write a hyperparameter file for this model.",
            argument="hparams_fname",
        )
    defaults = read_json(path, "file of default hyperparameters")
    templates = module_templates(model)
    try:
        hparams = hparams_from_dict(_for(templates, defaults, method), method.hparams_class)
    except SphereError as error:
        raise SphereError(f"In the default hyperparameters {path}: {error}") from error
    log.info("%s", _account(model, method, templates, hparams))
    return hparams


def defaults_path(method: str, hparams_dir: str | Path = "hparams") -> Path | None:
    """The file of a method's default hyperparameters: in `hparams_dir`, else the shipped one; None: there is none."""
    own = find(Path(hparams_dir) / FOLDER / f"{method}.json")
    paths = (own, shipped(Path("hparams") / FOLDER / f"{method}.json"))
    return next((path for path in paths if path.exists()), None)


def layers_at(start: float, count: int, n_layers: int, editable: Sequence[int]) -> list[int]:
    """`count` of the editable layers, from a relative depth on; earlier ones too where the model ends before.

    Args:
        start: 0 is the first layer, 1 the end of the model.
    """
    index = bisect_left(editable, round(start * n_layers))
    index = max(min(index, len(editable) - count), 0)
    return list(editable[index : index + count])


def _for(templates: ModuleTemplates, defaults: Any, method: type[Method]) -> dict[str, Any]:
    """The content of a hyperparameter file for a model."""
    place = defaults.get("layers") if isinstance(defaults, Mapping) else None
    if not isinstance(place, Mapping) or set(place) != {"from", "count"}:
        raise SphereError('layers must be a relative depth and a number, {"from": 0.14, "count": 5}.')
    layers = layers_at(place["from"], place["count"], templates.n_layers, templates.editable)
    last = {"v_loss_layer": templates.n_layers - 1}
    known = {field.name for field in dataclasses.fields(method.hparams_class)}
    return {k: v for k, v in last.items() if k in known} | defaults | {"layers": layers} | templates.to_dict()


def _account(
    model: nn.Module, method: type[Method], templates: ModuleTemplates, hparams: ModuleHParams
) -> str:
    """One line: what is used, where it is from, and what would be better."""
    found = ", ".join(f"{key} {value}" for key, value in templates.to_dict().items() if value)
    numbers = " ".join(map(str, hparams.layers))
    return (
        f"{method.name}'s default hyperparameters, not tuned for this model (`sphere tune` finds better ones, "
        f"`sphere hparams --write` makes a file of these): layers {numbers} of {templates.n_layers}; modules of "
        f"{type(model).__name__}, found by {templates.found_by}: {found}."
    )
