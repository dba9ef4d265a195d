"""A folder that transformers, vLLM and others load: safetensors in shards, tokenizer, configuration, generation config.

The model in memory is the only copy: it is cast in place, a parameter at a time, and written shard by shard. Tied
weights are written once, and tied again where they are loaded. Knows models. Knows nothing of runs' folders.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from sphere.errors import SphereError
from sphere.export.edited import EditedRun
from sphere.files import check_space
from sphere.models import DTYPES, load_model

SHARD_SIZE = "5GB"


class HuggingFaceFolder:
    """A whole model as transformers writes it.

    Args:
        dtype: a name of `sphere.models.DTYPES`; None: the one that the model was edited in.
        shard_size: the largest size of a file of weights, e.g. "5GB".

    Raises:
        SphereError: unknown dtype, or no size.
    """

    def __init__(self, dtype: str | None = None, shard_size: str = SHARD_SIZE) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise SphereError(f"Unknown dtype '{dtype}': use one of {', '.join(DTYPES)}.", argument="dtype")
        try:
            split_torch_state_dict_into_shards({}, max_shard_size=shard_size)  # reads the size as saving will
        except (ValueError, OverflowError) as error:
            raise SphereError(
                f"'{shard_size}' is no size of a file: give a number and KB, MB, GB or TB, e.g. 500MB.",
                argument="shard_size",
            ) from error
        self.dtype, self.shard_size = dtype, shard_size

    def write(self, run: EditedRun, folder: Path) -> list[str]:
        """Write the model; it is left in the dtype that was written. Returns what there is to say."""
        model = run.model
        if self.dtype is not None:
            cast(model, DTYPES[self.dtype])
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        check_space(folder, n_bytes)
        _make_valid(model)
        model.save_pretrained(folder, max_shard_size=self.shard_size)
        run.tokenizer.save_pretrained(folder)
        n_files = len(list(folder.glob("*.safetensors")))
        name = str(model.dtype).removeprefix("torch.")
        return [f"{n_bytes / 1e9:.2f} GB of weights in {name}, {n_files} file{'s' if n_files > 1 else ''}."]

    def read(self, run: EditedRun, folder: Path, device: str, device_map: str | None) -> PreTrainedModel:
        """Load what was written, as any model; the one in memory is given up first."""
        dtype = str(run.model.dtype).removeprefix("torch.")
        del run.model, run.weights
        gc.collect()
        return load_model(str(folder), device, dtype, device_map)[0]

    def title(self) -> str:
        """What it is, in a few words."""
        return "a whole model"

    def usage(self, run: EditedRun, out: str) -> str:
        """How it is loaded, as Markdown."""
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{out}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{out}")\n```'
        )


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters in place, one at a time, but for those that transformers keeps in float32 when it loads them."""
    kept: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept |= set(getattr(model, attribute, None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    if not all(torch.isfinite(p.sum(dtype=torch.float32)) for p in model.parameters()):
        raise SphereError(
            f"The weights do not fit into {str(dtype).removeprefix('torch.')}: use bfloat16 or float32.",
            argument="dtype",
        )


def _make_valid(model: PreTrainedModel) -> None:
    """Published generation configs name a temperature without sampling; what they mean is to sample."""
    try:
        if model.can_generate():
            model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
