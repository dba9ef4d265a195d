"""SPHERE: sequential knowledge editing on hyperspheres (arXiv 2510.01172).

from sphere import EditRequest, Editor, load_hparams, load_model, get_method

model, tokenizer = load_model()
hparams = load_hparams("hparams/AlphaEdit/SmolLM2-135M.json", get_method("AlphaEdit").hparams_class)
editor = Editor(model, tokenizer, "AlphaEdit", hparams, beta_hse=0.5, alpha=0.5)
editor.edit([EditRequest(0, "The capital of {} is", "France", "Rome", "Paris")])
editor.revert()
"""

from sphere.editor import BatchReport, Editor
from sphere.errors import SphereError
from sphere.hparams import HParams, hparams_from_dict, load_hparams
from sphere.methods import Method, Workspace, available_methods, get_method
from sphere.models import DEFAULT_MODEL, load_model
from sphere.projection import PrincipalDirections, principal_directions, project_update
from sphere.requests import EditRequest
from sphere.weights import EditedWeights

__all__ = [
    "DEFAULT_MODEL",
    "BatchReport",
    "EditRequest",
    "EditedWeights",
    "Editor",
    "HParams",
    "Method",
    "PrincipalDirections",
    "SphereError",
    "Workspace",
    "available_methods",
    "get_method",
    "hparams_from_dict",
    "load_hparams",
    "load_model",
    "principal_directions",
    "project_update",
]
