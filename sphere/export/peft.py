"""A LoRA adapter as peft writes it: adapter_config.json and adapter_model.safetensors, which vLLM and others read too.

    base_model.model.<module>.lora_A.weight    (r x in)
    base_model.model.<module>.lora_B.weight    (out x r)

The weight becomes W + lora_alpha / r * B A, with lora_alpha = r. All modules have the same r, since some readers know
no other. The files are written here: their few keys need no further library. Knows adapters and their files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sphere.embedded import EMBEDDED
from sphere.errors import SphereError
from sphere.export.adapter import Adapter, adapted, adapter_of
from sphere.export.edited import EditedRun
from sphere.factors import Factors
from sphere.files import check_space
from sphere.models import DTYPES

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class PeftAdapter:
    """A LoRA adapter for peft.

    Args:
        rank: None for the edits' own.
        dtype: a name of `sphere.models.DTYPES`; None: float32.

    Raises:
        SphereError: unknown dtype.
    """

    def __init__(self, rank: int | None = None, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise SphereError(f"Unknown dtype '{dtype}': use one of {', '.join(DTYPES)}.", argument="dtype")
        self.rank, self.dtype = rank, DTYPES[dtype or "float32"]

    def write(self, run: EditedRun, folder: Path) -> list[str]:
        """Write the adapter; the model is left with its weights as the adapter makes them."""
        adapter = adapter_of(run, self.rank, self.dtype)
        tensors = {}
        for name, factors in adapter.factors.items():
            module = PREFIX + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = factors.right.T.contiguous()
            tensors[f"{module}.lora_B.weight"] = factors.left
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        check_space(folder, n_bytes)
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(_config(run, adapter), indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(text, "utf-8")
        run.weights.restore(adapted(run, adapter.factors))
        return [*adapter.lines, f"{n_bytes / 1e6:.1f} MB."]

    def read(self, run: EditedRun, folder: Path, device: str, device_map: str | None) -> PreTrainedModel:
        """The unedited model with the adapter that was written, as its files say."""
        config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
        tensors, scale = load_file(folder / WEIGHTS_NAME), config["lora_alpha"] / config["r"]
        factors = {}
        for module in config["target_modules"]:
            a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
            factors[f"{module}.weight"] = Factors(b * scale, a.T)
        run.weights.restore(adapted(run, factors))
        return run.model

    def title(self) -> str:
        """What it is, in a few words."""
        return "a LoRA adapter"

    def usage(self, run: EditedRun, out: str) -> str:
        """How it is loaded, as Markdown."""
        embedded = run.model_name in EMBEDDED
        load = (
            "from sphere import load_model" if embedded else "from transformers import AutoModelForCausalLM"
        )
        base = (
            f'model, tokenizer = load_model("{run.model_name}")'
            if embedded
            else f'model = AutoModelForCausalLM.from_pretrained("{run.model_name}")'
        )
        return (
            f'from peft import PeftModel\n{load}\n\n{base}\nmodel = PeftModel.from_pretrained(model, "{out}")'
        )


def _config(run: EditedRun, adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run.model_name,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "target_modules": [name.removesuffix(".weight") for name in adapter.factors],
        "fan_in_fan_out": bool(run.weights.transposed),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
