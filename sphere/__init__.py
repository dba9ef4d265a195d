"""SPHERE: sequential knowledge editing on hyperspheres (arXiv 2510.01172).

from sphere import EditRequest, Editor, load_hparams, load_model, get_method

model, tokenizer = load_model()
hparams = load_hparams("hparams/AlphaEdit/SmolLM2-135M.json", get_method("AlphaEdit").hparams_class)
editor = Editor(model, tokenizer, "AlphaEdit", hparams, beta_hse=0.5, alpha=0.5)
editor.edit([EditRequest(0, "The capital of {} is", "France", "Rome", "Paris")])
editor.revert()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphere.defaults import default_hparams
    from sphere.editor import BatchReport, Editor
    from sphere.errors import SphereError
    from sphere.forward.passes import PassOptions
    from sphere.hparams import HParams, hparams_from_dict, load_hparams
    from sphere.methods import EditedModel, Method, Services, available_methods, get_method
    from sphere.models import DEFAULT_MODEL, load_model
    from sphere.projection import PrincipalDirections, principal_directions, project_update
    from sphere.requests import EditRequest
    from sphere.weights import EditedWeights

# name -> the module that it is imported from when first asked for, so that `--help` need not wait for PyTorch
_HOMES = {
    "BatchReport": "editor",
    "DEFAULT_MODEL": "models",
    "EditRequest": "requests",
    "EditedModel": "methods",
    "EditedWeights": "weights",
    "Editor": "editor",
    "HParams": "hparams",
    "Method": "methods",
    "PassOptions": "forward.passes",
    "PrincipalDirections": "projection",
    "Services": "methods",
    "SphereError": "errors",
    "available_methods": "methods",
    "default_hparams": "defaults",
    "get_method": "methods",
    "hparams_from_dict": "hparams",
    "load_hparams": "hparams",
    "load_model": "models",
    "principal_directions": "projection",
    "project_update": "projection",
}

__all__ = [
    "DEFAULT_MODEL",
    "BatchReport",
    "EditRequest",
    "EditedModel",
    "EditedWeights",
    "Editor",
    "HParams",
    "Method",
    "PassOptions",
    "PrincipalDirections",
    "Services",
    "SphereError",
    "available_methods",
    "default_hparams",
    "get_method",
    "hparams_from_dict",
    "load_hparams",
    "load_model",
    "principal_directions",
    "project_update",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sphere' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sphere.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
