"""What benchmarks run: the embedded default model on a CPU, a random Qwen2.5-7B on a GPU.

Timing does not depend on the weights' values, so nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from sphere.hparams import HParams, load_hparams
from sphere.methods import get_method
from sphere.models import DEFAULT_MODEL, load_model

HPARAMS = Path(__file__).parents[1] / "hparams"
METHOD = "AlphaEdit"
QWEN = "Qwen2.5-7B"


def benchmark_model(device: torch.device) -> tuple[Any, Any, HParams]:
    """A model, a tokenizer whose ids it takes, and the hyperparameters of AlphaEdit for it."""
    if device.type != "cuda":
        return default_model(device)
    tokenizer = default_model(torch.device("cpu"))[1]
    config = Qwen2Config(  # https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False), tokenizer, hparams_of(QWEN)


def default_model(device: torch.device) -> tuple[Any, Any, HParams]:
    """The embedded default model, its tokenizer, and the hyperparameters of AlphaEdit for it."""
    return *load_model(DEFAULT_MODEL, device=str(device)), hparams_of(DEFAULT_MODEL)


def hparams_of(label: str, method: str = METHOD) -> Any:
    """A method's shipped hyperparameters for a model of this name."""
    return load_hparams(HPARAMS / method / f"{label}.json", get_method(method).hparams_class)
