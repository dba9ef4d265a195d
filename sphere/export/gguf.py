"""A model as GGUF, for llama.cpp: a copy of the file that it came as, or a LoRA adapter for any file of it.

    <tensor>.lora_a    (r x in)     general.type = adapter, adapter.type = lora
    <tensor>.lora_b    (out x r)    adapter.lora.alpha = r

Rows of some tensors lie in another order in such files (queries and keys of Llama); which, is seen in the file of the
unedited model. Knows runs and GGUF files.
"""

from __future__ import annotations

import gc
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from torch import Tensor
from transformers import PreTrainedModel

from sphere.errors import SphereError
from sphere.export.adapter import adapted, adapter_of
from sphere.export.edited import EditedRun
from sphere.export.gguf_file import (
    QUANTISED,
    architecture,
    architecture_of,
    copied_size,
    copy_with,
    quantise,
    read_file,
    source_file,
    tensor_names,
    values_of,
)
from sphere.factors import Factors
from sphere.files import check_space
from sphere.models import load_model, model_label

REORDERED = ("attn_q", "attn_k")  # beginnings of what may have its rows in another order


class GgufForm:
    """The file that a model came as with the edited tensors replaced; a LoRA adapter where it came as none.

    Args:
        quant: type of the edited tensors, one of QUANTISED; None: their own in the file, and f32 for adapters.
        adapter: write an adapter although the model came as GGUF.
        rank: of the adapter; None: the edits' own.

    Raises:
        SphereError: unknown quant.
    """

    def __init__(self, quant: str | None = None, adapter: bool = False, rank: int | None = None) -> None:
        if quant is not None and quant not in QUANTISED:
            raise SphereError(
                f"Unknown type '{quant}' of tensors: use one of {', '.join(QUANTISED)}.", argument="quant"
            )
        self.kind = GGMLQuantizationType[quant.upper()] if quant else None
        self.adapter, self.rank = adapter, rank
        self._orders: dict[str, np.ndarray] = {}  # weight name -> which of its rows each row of the file is

    def write(self, run: EditedRun, folder: Path) -> list[str]:
        """Write the file; the run's model is left with the weights that it holds."""
        source = source_file(run.model_name, folder)
        reader = read_file(source) if source else None
        try:
            self.adapter = self.adapter or reader is None
            if reader is None or self.adapter:
                return self._write_adapter(run, folder, reader)
            return self._write_copy(run, folder, reader)
        finally:
            if source is not None and source.parent == folder:
                source.unlink()

    def read(self, run: EditedRun, folder: Path, device: str, device_map: str | None) -> PreTrainedModel:
        """What was written: the whole file loaded as any model, or the unedited model with the adapter."""
        (path,) = folder.glob("*.gguf")
        reader = read_file(path)
        if self.adapter:
            run.weights.restore(adapted(run, self._read_adapter(run, reader)))
            return run.model
        dtype = str(run.dtype).removeprefix("torch.")
        del run.model, run.weights
        gc.collect()
        return load_model(str(path), device, dtype, device_map)[0]

    def title(self) -> str:
        """What it is, in a few words."""
        return "a GGUF LoRA adapter" if self.adapter else "a GGUF file"

    def usage(self, run: EditedRun, out: str) -> str:
        """How it is used, as Markdown."""
        label = model_label(run.model_name)
        if self.adapter:
            return f"```\nllama-cli -m {label}.gguf --lora {out}/{label}-lora.gguf\n```"
        return f"```\nllama-cli -m {out}/{label}-edited.gguf\n```"

    def _write_copy(self, run: EditedRun, folder: Path, reader: GGUFReader) -> list[str]:
        names = tensor_names(architecture(reader), _n_layers(run), list(run.edited))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        replaced, held, lines = {}, {}, []
        for name, tensor_name in names.items():
            tensor = tensors.get(tensor_name)
            if tensor is None:
                raise SphereError(f"The GGUF file of {run.model_name} has no tensor '{tensor_name}'.")
            order = row_order(values_of(tensor), run.weights.canonical(name, run.original[name]), tensor_name)
            edited = run.weights.canonical(name, run.edited[name]).float()
            new = quantise(edited.numpy()[order], self._kind_of(tensor), tensor_name)
            self._orders[name], replaced[tensor_name] = order, new
            values = torch.from_numpy(values_of(new))[np.argsort(order)]
            lines.append(_loss(run, name, edited, values, new.type.name))
            held[name] = run.weights.canonical(name, values).to(run.edited[name].dtype).contiguous()
        check_space(folder, copied_size(reader, replaced))
        copy_with(reader, folder / f"{model_label(run.model_name)}-edited.gguf", replaced)
        run.weights.restore(held)
        return [f"A copy of the GGUF file with {len(replaced)} of {len(tensors)} tensors replaced.", *lines]

    def _kind_of(self, tensor: ReaderTensor) -> GGMLQuantizationType:
        """What an edited tensor is written in."""
        return tensor.tensor_type if self.kind is None else self.kind

    def _write_adapter(self, run: EditedRun, folder: Path, reader: GGUFReader | None) -> list[str]:
        kind = GGMLQuantizationType.F32 if self.kind is None else self.kind
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            raise SphereError("The factors of an adapter are f32 or f16.", argument="quant")
        config = run.model.config
        arch = architecture(reader) if reader else architecture_of(config.get_text_config().model_type)
        names = tensor_names(arch, _n_layers(run), list(run.edited))
        dtype = torch.float32 if kind == GGMLQuantizationType.F32 else torch.float16
        adapter = adapter_of(run, self.rank, dtype)
        path = folder / f"{model_label(run.model_name)}-lora.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_type("adapter")
        writer.add_name(f"{model_label(run.model_name)} after {run.n_edits} edits")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
        for name, tensor_name in names.items():
            factors, order = adapter.factors[name], _order(run, name, tensor_name, reader)
            self._orders[name] = order
            writer.add_tensor(f"{tensor_name}.lora_a", factors.right.T.contiguous().numpy())
            writer.add_tensor(f"{tensor_name}.lora_b", np.ascontiguousarray(factors.left.numpy()[order]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        run.weights.restore(adapted(run, adapter.factors))
        return [*adapter.lines, f"{path.stat().st_size / 1e6:.1f} MB."]

    def _read_adapter(self, run: EditedRun, reader: GGUFReader) -> dict[str, Factors]:
        """The factors of an adapter, by weight name, as the file holds them."""
        tensors = {tensor.name: values_of(tensor) for tensor in reader.tensors}
        alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
        factors = {}
        for name, tensor_name in tensor_names(architecture(reader), _n_layers(run), list(run.edited)).items():
            a, b = (tensors[f"{tensor_name}.lora_{side}"] for side in "ab")
            scale = float(alpha.contents()) / len(a) if alpha else 1.0
            b = b[np.argsort(self._orders[name])]
            factors[name] = Factors(torch.from_numpy(b) * scale, torch.from_numpy(a).T)
        return factors


def row_order(stored: np.ndarray, original: Tensor, name: str) -> np.ndarray:
    """Which row of the unedited weight each row of a file's tensor is: (out,).

    Args:
        stored: the tensor's values (out x in).
        original: the unedited weight (out x in), in the dtype that it was edited in.

    Raises:
        SphereError: the tensor does not consist of its rows.
    """
    ours = original.float().numpy()
    theirs = torch.from_numpy(stored).to(original.dtype).float().numpy()
    if theirs.shape == ours.shape:
        if np.array_equal(theirs, ours):
            return np.arange(len(ours))
        places = {row.tobytes(): index for index, row in enumerate(ours)}
        order = [places.get(row.tobytes()) for row in theirs]
        if None not in order and len(set(order)) == len(ours):
            return np.array(order)
    raise SphereError(
        f"The tensor '{name}' of the GGUF file is not the weight that was edited, in whatever order of its rows: give "
        "the file that the run started from.",
        argument="model_name",
    )


def _order(run: EditedRun, name: str, tensor_name: str, reader: GGUFReader | None) -> np.ndarray:
    """The order of rows in the files that an adapter is for."""
    original = run.weights.canonical(name, run.original[name])
    if reader is not None:
        (tensor,) = (tensor for tensor in reader.tensors if tensor.name == tensor_name)
        return row_order(values_of(tensor), original, tensor_name)
    if tensor_name.split(".")[-2].startswith(REORDERED):
        raise SphereError(
            f"The rows of '{tensor_name}' may lie in another order in GGUF files: export to peft, or from a run of the "
            "GGUF file.",
            argument="to",
        )
    return np.arange(len(original))


def _n_layers(run: EditedRun) -> int:
    return int(run.model.config.get_text_config().num_hidden_layers)


def _loss(run: EditedRun, name: str, edited: Tensor, held: Tensor, kind: str) -> str:
    """How much of a weight its type loses, beside what the edits changed."""
    norm, change = float(edited.norm()), float(run.change(name).norm())
    lost = float((held - edited).norm())
    return (
        f"{name} in {kind}: off by {100 * lost / norm:.2g} % of the weight, of which the edits changed "
        f"{100 * change / norm:.2g} %."
    )
