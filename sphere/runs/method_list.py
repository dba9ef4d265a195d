"""What there is to edit with: every method, its reference, its defaults and the models it has hyperparameters for.

Knows method classes and hyperparameter files; loads no model.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from sphere.hparams import load_hparams
from sphere.methods import Method, available_methods
from sphere.models import DEFAULT_MODEL
from sphere.resources import find
from sphere.runs.config import BETA_HSE

WIDTH = 110
# Where modules are, and what has one value only: these say nothing of a method.
PLUMBING = ("_tmp", "_module", "fact_token", "layer_selection")


def describe_methods(hparams_dir: str | Path = "hparams") -> str:
    """One paragraph per method, for reading.

    Args:
        hparams_dir: holds one folder per method.

    Raises:
        SphereError: the default model's hyperparameter file of some method is not sound.
    """
    methods = available_methods().values()
    about = f"Hyperparameters are shown for {DEFAULT_MODEL}; each file in {hparams_dir}/<method>/ is for one model."
    return "\n\n".join([about, *(_describe(method, Path(hparams_dir)) for method in methods)])


def _describe(method: type[Method], hparams_dir: Path) -> str:
    folder = find(hparams_dir / method.name)
    models = sorted(path.stem for path in folder.glob("*.json"))
    lines = [
        ("reference", method.reference),
        ("SPHERE", f"alpha {method.default_alpha:g}, beta_hse {BETA_HSE:g}"),
    ]
    if DEFAULT_MODEL in models:
        lines.append((f"{DEFAULT_MODEL}", _settings(method, folder / f"{DEFAULT_MODEL}.json")))
    lines.append(("hparams", f"{folder}/ for {', '.join(models)}" if models else f"none in {folder}"))
    width = max(len(name) for name, _ in lines) + 2
    indent = " " * (width + 4)
    paragraphs = [
        textwrap.fill(text, WIDTH, initial_indent=f"    {name:{width}}", subsequent_indent=indent)
        for name, text in lines
    ]
    return "\n".join([method.name, *paragraphs])


def _settings(method: type[Method], path: Path) -> str:
    """A hyperparameter file, defaults that it leaves out included, in one line."""
    values = load_hparams(path, method.hparams_class).to_dict()
    return ", ".join(
        f"{key} {_plain(value)}"
        for key, value in values.items()
        if not key.endswith(PLUMBING) and value not in (None, [])
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
