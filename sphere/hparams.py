"""Hyperparameters: one file per method and model, with the keys that the MEMIT family of projects uses.

Knows names and types only. A method that needs more declares a subclass of `HParams` beside itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sphere.errors import SphereError
from sphere.files import read_json
from sphere.peer_hparams import in_own_keys
from sphere.resources import find, places

log = logging.getLogger(__name__)

H = TypeVar("H")

# Keys for the reader that decide nothing: what other projects write, and how a tuning found the rest.
INFORMATIONAL = ("model_name", "alg_name", "found_by")
YAML = (".yaml", ".yml")
N_CONTEXT_TEMPLATES = 5  # MEMIT's; their beginnings are in `sphere.values.context_templates`
# Keys that files of earlier versions do not have: left out where they are not given.
NOT_GIVEN = {
    "rules": (),
    "n_context_templates": N_CONTEXT_TEMPLATES,
    "z_stop": None,
    "z_stop_probability": None,
    "z_rescale": False,
}
MOM2_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class ModuleHParams:
    """Where things are in the model: templates with `{}` for the layer's number, and the layers to edit.

    Attributes:
        rules: names of update rules (`sphere.rules.RULES`) in place of the method's own; none: the method's own.
    """

    layers: tuple[int, ...]
    rewrite_module_tmp: str
    layer_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    mlp_module_tmp: str = ""
    attn_module_tmp: str = ""
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers or sorted(set(self.layers)) != list(self.layers):
            raise SphereError(f"layers must be increasing layer numbers, got {list(self.layers)}.")
        for key in ("rewrite_module_tmp", "layer_module_tmp"):
            if "{}" not in getattr(self, key):
                raise SphereError(
                    f"{key} must hold '{{}}' for the layer's number, got {getattr(self, key)!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what a run's configuration keeps."""
        values = dataclasses.asdict(self)
        values = {k: v for k, v in values.items() if k not in NOT_GIVEN or v != NOT_GIVEN[k]}
        return json.loads(json.dumps(values))


@dataclass(frozen=True, kw_only=True)
class TargetHParams(ModuleHParams):
    """How target values z are optimised: the `v_*` keys of ROME, MEMIT and AlphaEdit.

    Attributes:
        clamp_norm_factor: ||delta|| <= clamp_norm_factor * ||h0||.
        v_num_grad_steps: forward passes; the last one takes no update.
        v_lr: Adam's learning rate.
        v_loss_layer: layer whose output, through ln_f and lm_head, gives the target's likelihood.
        v_weight_decay: weight of ||delta|| / ||h0||^2.
        kl_factor: weight of the KL term on "{subject} is a".
        n_context_templates: contexts that the model writes for a fact, beside the bare prompt: the published five, or
            fewer for less work (z costs in proportion to 1 + n).
        z_stop: a request stops once its target's tokens have been the likeliest in all its prompts for so many further
            steps (`sphere.values.z_stop`); null: they do not matter.
        z_stop_probability: or once their mean probability is above this; null: it does not matter.
        z_rescale: bring z to a norm of the unedited model (`sphere.values.z_rescale`).
    """

    clamp_norm_factor: float
    v_num_grad_steps: int
    v_lr: float
    v_loss_layer: int
    v_weight_decay: float
    kl_factor: float
    fact_token: str = "subject_last"
    layer_selection: str = "all"
    n_context_templates: int = N_CONTEXT_TEMPLATES
    z_stop: int | None = None
    z_stop_probability: float | None = None
    z_rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fact_token != "subject_last":
            raise SphereError(f"fact_token must be 'subject_last', got {self.fact_token!r}.")
        if self.layer_selection != "all":
            raise SphereError(f"layer_selection must be 'all', got {self.layer_selection!r}.")
        if self.v_num_grad_steps < 1:
            raise SphereError(f"v_num_grad_steps must be at least 1, got {self.v_num_grad_steps}.")
        if self.v_loss_layer < max(self.layers):
            raise SphereError(
                f"v_loss_layer {self.v_loss_layer} lies below the last edited layer {max(self.layers)}: raise it."
            )
        if not 0 <= self.n_context_templates <= N_CONTEXT_TEMPLATES:
            raise SphereError(
                f"n_context_templates must be from 0 (the bare prompt alone) to {N_CONTEXT_TEMPLATES} (MEMIT's), got "
                f"{self.n_context_templates}."
            )
        require(self, positive=("clamp_norm_factor", "v_lr"), not_negative=("v_weight_decay", "kl_factor"))
        if self.z_stop is not None:
            require(self, not_negative=("z_stop",))
        if self.z_stop_probability is not None and not 0 < self.z_stop_probability < 1:
            raise SphereError(
                f"z_stop_probability must be a probability in (0, 1) or null, got {self.z_stop_probability}."
            )


@dataclass(frozen=True, kw_only=True)
class HParams(TargetHParams):
    """The MEMIT family's keys: target values and second moments of keys.

    Attributes:
        mom2_adjustment: whether a method uses the second moment where it may go without (ROME).
        mom2_update_weight: lambda, the weight of E[k k^T] in MEMIT's solve.
        mom2_dataset: "wikipedia", "wikitext", "self" (the model's own samples), or a .txt/.jsonl file.
        mom2_n_samples: number of documents.
        mom2_dtype: dtype in which the second moment is kept.
    """

    mom2_adjustment: bool
    mom2_update_weight: float
    mom2_dataset: str
    mom2_n_samples: int
    mom2_dtype: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("mom2_n_samples", "mom2_update_weight"))
        if self.mom2_dtype not in MOM2_DTYPES:
            raise SphereError(f"mom2_dtype must be one of {', '.join(MOM2_DTYPES)}, got {self.mom2_dtype!r}.")


def require(hparams: Any, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Check numbers among the fields of hyperparameters.

    Raises:
        SphereError: one is out of its range, or NaN.
    """
    for key in positive:
        if not getattr(hparams, key) > 0:
            raise SphereError(f"{key} must be positive, got {getattr(hparams, key)}.")
    for key in not_negative:
        if not getattr(hparams, key) >= 0:
            raise SphereError(f"{key} must not be negative, got {getattr(hparams, key)}.")


def load_hparams(path: str | Path, kind: type[H]) -> H:
    """Read and check a hyperparameter file, this project's or another's (`sphere.peer_hparams`).

    Args:
        path: JSON; or YAML, if its name ends in .yaml or .yml.
        kind: the dataclass of the method's hyperparameters.

    Raises:
        SphereError: no such file, no JSON or YAML, or unknown, missing and ill-typed keys, all of them named.
    """
    path = find(path)
    if not path.exists():
        raise _no_file(path)
    content = read_content(path)
    try:
        values, account = in_own_keys(content, {field.name for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
        hparams = hparams_from_dict(values, kind)
    except SphereError as error:
        raise SphereError(f"In the hyperparameter file {path}: {error}") from error
    if account:
        log.info("The hyperparameter file %s has keys of another project: %s.", path, account)
    return hparams


def read_content(path: Path) -> dict[str, Any]:
    """The keys and values of a hyperparameter file, unchecked.

    Raises:
        SphereError: no JSON object, or no YAML mapping.
    """
    content = _read_yaml(path) if path.suffix in YAML else read_json(path, "hyperparameter file")
    if not isinstance(content, dict):
        form = "YAML mapping" if path.suffix in YAML else "JSON object"
        raise SphereError(f"The hyperparameter file {path} must hold a {form}, got {type(content).__name__}.")
    return content


def _read_yaml(path: Path) -> Any:
    """Plain values only; numbers like 5e-1 are numbers, which YAML 1.1 takes for strings."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise SphereError(f"The hyperparameter file {path} is not valid YAML ({reason}).") from error


def tuned_on(path: str | Path, ds_name: str) -> set[int]:
    """The case ids of a dataset that a hyperparameter file was tuned on; none where it does not say so."""
    found_by = read_content(find(path)).get("found_by")
    if not isinstance(found_by, dict) or found_by.get("dataset") != ds_name:
        return set()
    return {case_id for case_id in found_by.get("case_ids", ()) if isinstance(case_id, int)}


def _no_file(path: Path) -> SphereError:
    """Where a hyperparameter file was looked for, and which ones there are."""
    folders = [place.resolve() for place in places(path.parent)]
    kinds = (".json", *YAML)
    there = sorted(
        {f.name for folder in folders if folder.is_dir() for f in folder.iterdir() if f.suffix in kinds}
    )
    advice = (
        f"choose one of: {', '.join(there)}, or another folder" if there else "give the folder that holds it"
    )
    looked = " and ".join(dict.fromkeys(map(str, folders)))
    return SphereError(
        f"No hyperparameter file at {path} (looked in {looked}): {advice}.",
        argument=("hparams_fname", "hparams_dir"),
    )


def hparams_from_dict(content: dict[str, Any], kind: type[H]) -> H:
    """The checked hyperparameters of a plain dictionary (a file's content, a run's configuration).

    Args:
        kind: a dataclass whose fields are numbers, strings, true or false, lists of one of them, or null.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types_ = typing.get_type_hints(kind)
    problems, values = [], {}
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [n for n in required if n not in content]
    unknown = [k for k in content if k not in fields and k not in INFORMATIONAL]
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    if unknown:
        problems.append(f"unknown {', '.join(unknown)}")
    for name, value in content.items():
        if name in INFORMATIONAL and name not in fields:
            log.debug("Hyperparameter %s=%r is informational and not used.", name, value)
        elif name in fields:
            try:
                values[name] = _coerce(value, types_[name])
            except TypeError as error:
                problems.append(f"{name} must be {error}, got {value!r}")
    if problems:
        raise SphereError(f"{kind.__name__}: {'; '.join(problems)}.")
    return kind(**values)


def _coerce(value: Any, wanted: Any) -> Any:
    """`value` as the field's type; raises TypeError with the type's plain name."""
    if isinstance(wanted, types.UnionType):
        if value is None and type(None) in wanted.__args__:
            return None
        wanted = next(a for a in wanted.__args__ if a is not type(None))
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        if not isinstance(value, list | tuple):
            raise TypeError(f"a list of {_NAMES[item]}s")
        return tuple(_coerce(v, item) for v in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and number:
        return float(value)
    if wanted is int and number and float(value).is_integer():
        return int(value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    raise TypeError(f"a {_NAMES[wanted]}")


_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "string"}
