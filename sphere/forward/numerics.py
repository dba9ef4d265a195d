"""What decides the numbers that a model computes, beside its weights and its input: for the keys of what is kept.

Knows models and devices; knows nothing of what is computed or kept.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import transformers

# Entries of a model's configuration that say where it came from, not what it computes.
PROVENANCE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


def computation(model: Any) -> dict[str, Any]:
    """Architecture, configuration and dtypes: what decides a model's numbers beside its weights, but for rounding."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in PROVENANCE}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "architecture": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    }


def numerics(model: Any) -> dict[str, Any]:
    """Architecture, configuration, attention, dtypes, devices, threads and versions: all that rounding depends on.

    Equal for two models with equal weights only if they compute the same numbers from the same input, as far as their
    devices do twice the same. JSON-able.
    """
    devices = sorted({p.device for p in model.parameters()}, key=str)
    return {
        **computation(model),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "devices": [device_name(device) for device in devices],
        "threads": torch.get_num_threads() if any(d.type == "cpu" for d in devices) else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_name(device: torch.device) -> str:
    """What kind of device it is; of a CPU, the instructions that its kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
