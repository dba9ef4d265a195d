"""Hyperparameter files of other projects of the MEMIT family: what their keys are here, and which decide nothing here.

Knows the names that ROME, MEMIT, AlphaEdit, the published code of SPHERE and EasyEdit use. A key is passed over only
where what it decides is decided elsewhere here, or where its value is the one that this project has.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from sphere.errors import SphereError
from sphere.strength import AUTO, OrAuto, in_words

# What a file may say of SPHERE -> the settings of a run: by their own names, and by EasyEdit's as its files spell them.
SPHERE_KEYS = {
    "beta_hse": "beta_hse",
    "alpha": "alpha",
    "alpha_budget": "alpha_budget",
    "cumulative_ratio": "beta_hse",
    "suppression_strength": "alpha",
    "suppression strength": "alpha",
    "suppresion_strength": "alpha",
}
# Settings of a run, not of a method, here; P_loc is where a null-space projector was kept, which is made anew here, and
# FT's kl_factor is read by no project.
PASSED_OVER = (
    "device",
    "model_parallel",
    "max_length",
    "batch_size",
    "stats_dir",
    "P_loc",
    "kl_factor",
)
NOT_USED = (
    "context_template_length_params"  # by any method, though ROME has the key: the templates here are MEMIT's
)
# Keys that decide something, and the values with which they decide what is done here anyway.
ONLY = {
    "wd_power_law": (None, "the weight decay is the same for any number of edits"),
    "objective_optimization": ("target_new", "FT trains the target's tokens, each at its own position"),
    "fp16": (False, "the model's type is a setting of the run, dtype"),
}


def in_own_keys(content: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], str]:
    """The content of a hyperparameter file by the names and values of this project.

    Args:
        known: the keys of the method's hyperparameters; what is in them is the method's, whatever it is elsewhere.

    Returns:
        values: `content` without what decides nothing here; unknown keys that may decide something stay.
        account: what was changed and left out, for the log; "" for a file of this project.

    Raises:
        SphereError: a value that would decide what cannot be decided here.
    """
    values, changed, without_effect = dict(content), [], []
    for setting, value in sphere_settings(content, known).items():
        if (key := _key_of(content, setting)) != setting:
            changed.append(f"{key} {in_words(value)} is {setting}, unless that is given")
    for key in content:
        if key in SPHERE_KEYS and key not in known:
            del values[key]
        elif key == NOT_USED:
            without_effect.append(key)
            if key not in known:
                del values[key]
        elif key in known:
            continue
        elif key in ONLY:
            _check_only(key, content[key])
            del values[key]
            without_effect.append(key)
        elif key in PASSED_OVER:
            del values[key]
            without_effect.append(key)
    module = values.get("rewrite_module_tmp")
    if isinstance(module, str) and module.endswith(".weight"):
        values["rewrite_module_tmp"] = module.removesuffix(".weight")
        changed.append("rewrite_module_tmp names a weight, its module is taken")
    if values.get("norm_constraint") is False:
        values["norm_constraint"] = None
        changed.append("norm_constraint false is null")
    parts = [*changed, *([f"without effect here: {', '.join(without_effect)}"] if without_effect else [])]
    return values, "; ".join(parts)


def sphere_settings(content: Mapping[str, Any], known: Collection[str]) -> dict[str, OrAuto]:
    """What a file says of SPHERE: "beta_hse", "alpha" and "alpha_budget", as far as it does.

    Args:
        known: the keys of the method's hyperparameters, which say nothing of SPHERE.

    Raises:
        SphereError: neither numbers nor, where it may be, "auto", or two spellings of one that differ.
    """
    found: dict[str, OrAuto] = {}
    for key, setting in SPHERE_KEYS.items():
        if key not in content or key in known:
            continue
        value = content[key]
        word = value == AUTO and setting != "alpha_budget"
        if not word and (isinstance(value, bool) or not isinstance(value, int | float)):
            instead = "" if setting == "alpha_budget" else f" or '{AUTO}'"
            raise SphereError(f"{key} must be a number{instead}, got {value!r}.")
        if found.setdefault(setting, value if word else float(value)) != value:
            raise SphereError(f"{key} {in_words(value)} contradicts another key for {setting}: remove one.")
    return found


def _key_of(content: Mapping[str, Any], setting: str) -> str:
    """The key of a file that says a setting."""
    return next(key for key, name in SPHERE_KEYS.items() if name == setting and key in content)


def _check_only(key: str, value: Any) -> None:
    only, reason = ONLY[key]
    if value != only:
        raise SphereError(f"{key} must be {json.dumps(only)} ({reason}), got {json.dumps(value)}.")
