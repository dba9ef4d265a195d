"""The settings of a run, and what follows from them alone: its folder, its files, the command that makes it again.

Knows names and paths. Loads no model and writes nothing.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from sphere.checkpoints import run_folder
from sphere.editor import ON_BREAKDOWN
from sphere.errors import SphereError
from sphere.forward.passes import PassOptions
from sphere.methods import get_method
from sphere.models import DEFAULT_MODEL, model_label

Z_MATMUL_DTYPES = {"model": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is decided by and what it logs; the flags of `experiments.evaluate` by the same names."""

    alg_name: str = "AlphaEdit"
    model_name: str = DEFAULT_MODEL
    hparams_fname: str | None = None
    ds_name: str = "starter"
    dataset_size_limit: int | None = 40
    num_edits: int = 20
    beta_hse: float = 0.5
    alpha: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    data_dir: str = "data"
    hparams_dir: str = "hparams"
    stats_dir: str = "data/stats"
    cache_dir: str = "data/cache"
    output_dir: str = "Edited_Weight"
    checkpoints: str = "ends"
    log_energy_every: int = 1
    tensorboard: bool = False
    batch_tokens: int | None = None
    z_matmul_dtype: str = "model"
    on_breakdown: str = "stop"
    conserve_memory: bool = False
    use_cache: bool = False
    continue_from_run: bool = False
    overwrite: bool = False

    @property
    def passes(self) -> PassOptions:
        """How this run's forward passes are cut."""
        return PassOptions(
            batch_tokens=self.batch_tokens,
            conserve_memory=self.conserve_memory,
            z_matmul_dtype=Z_MATMUL_DTYPES[self.z_matmul_dtype],
        )

    def check(self) -> None:
        """Refuse what no run can be made of.

        Raises:
            SphereError: a flag out of its range, or flags that contradict one another.
        """
        if self.num_edits < 1:
            raise SphereError(
                f"--num_edits is the size of a batch and must be at least 1, got {self.num_edits}."
            )
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise SphereError(
                f"--batch_tokens is the size of a forward pass and must be at least 1, got {self.batch_tokens}."
            )
        if self.z_matmul_dtype not in Z_MATMUL_DTYPES:
            raise SphereError(
                f"--z_matmul_dtype is {' or '.join(Z_MATMUL_DTYPES)}, the type that the search for z multiplies in; "
                f"got '{self.z_matmul_dtype}'."
            )
        if self.on_breakdown not in ON_BREAKDOWN:
            raise SphereError(
                f"on_breakdown is {' or '.join(ON_BREAKDOWN)}, what an absurdly large update does to the run; got "
                f"'{self.on_breakdown}'."
            )
        if not 0 <= self.seed < 2**63:
            raise SphereError(f"--seed must be a whole number from 0 to 2^63 - 1, got {self.seed}.")
        if self.continue_from_run and self.overwrite:
            raise SphereError("--continue_from_run keeps a run and --overwrite removes it: give one of them.")


def hparams_path(config: RunConfig) -> Path:
    """The hyperparameter file of a run."""
    file = config.hparams_fname or f"{model_label(config.model_name)}.json"
    return Path(config.hparams_dir) / config.alg_name / file


def folder_of(config: RunConfig) -> Path:
    """Where a run lands."""
    return run_folder(
        config.output_dir,
        config.alg_name,
        model_label(config.model_name),
        config.ds_name,
        config.num_edits,
        config.beta_hse,
        alpha_of(config),
    )


def alpha_of(config: RunConfig) -> float:
    """A run's suppression strength: its own, or its method's default."""
    return get_method(config.alg_name).default_alpha if config.alpha is None else config.alpha


def saved_at(checkpoints: str, ends: Sequence[int]) -> set[int]:
    """Numbers of edits at which weights are saved: "ends" (first and last batch), "all", or a list "100,300".

    Args:
        ends: number of edits after each batch.

    Raises:
        SphereError: something else, or a number at which no batch ends.
    """
    if checkpoints == "all":
        return set(ends)
    result = {ends[0], ends[-1]}
    if checkpoints == "ends":
        return result
    try:
        wanted = {int(part) for part in checkpoints.split(",")}
    except ValueError:
        raise SphereError(
            f"--checkpoints is 'ends', 'all' or numbers of edits such as 100,300; got '{checkpoints}'."
        ) from None
    if strays := sorted(wanted - set(ends)):
        raise SphereError(
            f"--checkpoints names {strays}, but batches end at {', '.join(map(str, ends[:5]))}"
            f"{', ...' if len(ends) > 5 else ''}: give multiples of --num_edits."
        )
    return result | wanted


def describe(config: RunConfig, command: str | None) -> dict[str, Any]:
    """A configuration with what else there is to know of how a run was made, JSON-able."""
    return {
        **asdict(config),
        "command": command or command_of(asdict(config)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def command_of(config: Mapping[str, Any]) -> str:
    """The command that makes a run of this configuration (`run.json`, or a `RunConfig` as a dictionary) again."""
    words = ["python", "-m", "experiments.evaluate"]
    skipped = {"continue_from_run", "overwrite"}
    values = dict(config)
    if values.get("dataset_size_limit") is None and "case_ids" in values:
        values["dataset_size_limit"] = len(values["case_ids"])  # the command's own default is no "all"
    for field in fields(RunConfig):
        value = values.get(field.name, field.default)
        if field.name in skipped or value == field.default or value is None:
            continue
        words.append(f"--{field.name}" if value is True else f"--{field.name}={value}")
    return shlex.join(words)
