"""The model that a run started from, loaded as the run had it. Knows run.json and models; knows nothing of states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import CONFIG_NAME
from sphere.errors import SphereError
from sphere.models import load_model


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are loaded.

    Attributes:
        model_name: the unedited model, where it is another one than the run or the export names.
        dtype: "auto": that of the run.
        chat_template: put prompts into the user's turn; a run that was edited so is asked so anyway.
    """

    model_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    chat_template: bool = False


def model_of(folder: Path, config: Mapping[str, Any], options: ModelOptions) -> tuple[str, str]:
    """Name and dtype of a run's model.

    Args:
        config: the run's `run.json`.

    Raises:
        SphereError: neither the run nor the options name it.
    """
    name = options.model_name or config.get("model_name")
    if not name:
        raise SphereError(
            f"No {CONFIG_NAME} in {folder} names the model that was edited: name it.", argument="model_name"
        )
    own = str(config.get("model_dtype", "auto")).removeprefix("torch.")
    return str(name), own if options.dtype == "auto" else options.dtype


def load_run_model(
    folder: Path, config: Mapping[str, Any], options: ModelOptions
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer of a run; see `model_of`."""
    name, dtype = model_of(folder, config, options)
    return load_model(name, options.device, dtype, options.device_map)
