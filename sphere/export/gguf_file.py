"""GGUF files: where a model's lies, a copy with some tensors replaced, and the names of tensors in it.

In a copy everything but the replaced tensors is there byte for byte: the metadata as one block, the other tensors as
they lie in the file, which is never in memory as a whole. Where a tensor's type, and so its size, becomes another one,
the entries of all tensors get new offsets. Knows files of this format. Knows nothing of runs.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

from sphere.embedded import EMBEDDED, assemble, part_files
from sphere.errors import SphereError

# Model types of transformers whose name in GGUF files is another one, beyond hyphens and "_text".
ARCHITECTURES = {"mistral": "llama", "cohere": "command-r", "phi": "phi2", "gpt_bigcode": "starcoder"}
# What the gguf package can make of floating point numbers.
QUANTISED = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@dataclass(frozen=True)
class Replacement:
    """What takes a tensor's place: its type, and its values in that type as bytes (out x bytes of a row)."""

    type: GGMLQuantizationType
    data: np.ndarray


def came_as_gguf(model_name: str) -> bool:
    """Whether a model is loaded from a GGUF file."""
    path = Path(model_name)
    return (path.is_file() and path.suffix == ".gguf") or (model_name in EMBEDDED and not path.exists())


def source_file(model_name: str, workspace: Path) -> Path | None:
    """The GGUF file that a model is loaded from; None where it comes as something else.

    Args:
        workspace: a folder to put a file together in that comes in parts.
    """
    path = Path(model_name)
    if not came_as_gguf(model_name):
        return None
    if path.exists():
        return path
    parts = part_files(model_name)
    if len(parts) == 1:
        return parts[0]
    whole = workspace / "source.gguf"
    assemble(parts, whole, EMBEDDED[model_name].sha256)
    return whole


def read_file(path: Path) -> GGUFReader:
    """The entries of a file; tensors are mapped, not read.

    Raises:
        SphereError: no GGUF file, or one of the other byte order.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise SphereError(f"{path} cannot be read as GGUF ({error}): get it anew.") from error
    if reader.byte_order != "I" or not reader.tensors:
        raise SphereError(f"{path} has no tensors, or the byte order of another machine: convert it.")
    return reader


def architecture(reader: GGUFReader) -> str:
    """The name of a file's architecture."""
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    return "" if field is None else str(field.contents())


def architecture_of(model_type: str) -> str:
    """The name that GGUF files have for a model type of transformers.

    Raises:
        SphereError: there is none.
    """
    known = set(gguf.MODEL_ARCH_NAMES.values())
    plain = model_type.removesuffix("_text")
    tried = (ARCHITECTURES.get(plain, plain), plain.replace("_", ""), plain.replace("_", "-"))
    for name in tried:
        if name in known:
            return name
    raise SphereError(
        f"The gguf package knows no architecture '{model_type}': export to hf or peft.", argument="to"
    )


def tensor_names(architecture: str, n_layers: int, names: list[str]) -> dict[str, str]:
    """Weight name of transformers -> name of its tensor, e.g. blk.4.ffn_down.weight.

    Raises:
        SphereError: the architecture has no such tensor.
    """
    kinds = {value: kind for kind, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], n_layers) if architecture in kinds else None
    found = {name: table.get_name(name, (".weight",)) if table else None for name in names}
    result = {name: tensor for name, tensor in found.items() if tensor}
    if lost := [name for name in names if name not in result]:
        raise SphereError(
            f"GGUF files of the architecture '{architecture}' have no tensor for '{lost[0]}': export to hf or peft.",
            argument="to",
        )
    return result


def quantise(values: np.ndarray, kind: GGMLQuantizationType, name: str) -> Replacement:
    """Values (out x in, float32) in a type.

    Raises:
        SphereError: the gguf package cannot make that type, or rows do not consist of whole blocks of it.
    """
    if kind.name.lower() not in QUANTISED:
        raise SphereError(
            f"'{name}' is of type {kind.name} in the GGUF file, into which the gguf package cannot bring new values: "
            "choose another one for the edited tensors, f16 or q8_0.",
            argument="quant",
        )
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.shape[1] % block:
        raise SphereError(
            f"The rows of '{name}' have {values.shape[1]} entries, no multiple of the {block} of a block of "
            f"{kind.name}: choose f16.",
            argument="quant",
        )
    return Replacement(kind, np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(values), kind)))


def values_of(tensor: Any) -> np.ndarray:
    """The values of a file's tensor, or of a replacement, in float32 (out x in)."""
    kind = tensor.type if isinstance(tensor, Replacement) else tensor.tensor_type
    return np.array(gguf.quants.dequantize(tensor.data, kind), dtype=np.float32)


def copy_with(reader: GGUFReader, target: Path, replaced: Mapping[str, Replacement]) -> None:
    """Write a file as another one, with some of its tensors replaced by name.

    Args:
        reader: of the other one, as `read_file` gives it.
    """
    alignment = int(reader.alignment)
    by_place = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    offsets, end = {}, 0
    for tensor in by_place:
        offsets[tensor.name] = end
        end += _padded(_size(tensor, replaced), alignment)
    with target.open("wb") as file:
        # Up to the tensors' entries: magic number, version, counts, all metadata.
        file.write(reader.data[: min(tensor.field.offset for tensor in reader.tensors)].data)
        for tensor in reader.tensors:
            *name_and_shape, old_type, _ = tensor.field.parts
            new = replaced.get(tensor.name)
            file.write(b"".join(part.tobytes() for part in name_and_shape))
            file.write(struct.pack("=IQ", int(new.type if new else old_type[0]), offsets[tensor.name]))
        _pad(file, alignment)
        for tensor in by_place:
            new = replaced.get(tensor.name)
            start = tensor.data_offset
            file.write((new.data if new else reader.data[start : start + tensor.n_bytes]).tobytes())
            _pad(file, alignment)


def copied_size(reader: GGUFReader, replaced: Mapping[str, Replacement]) -> int:
    """Bytes of a copy, within a few."""
    sizes = (_padded(_size(tensor, replaced), int(reader.alignment)) for tensor in reader.tensors)
    return int(reader.data_offset) + sum(sizes)


def _size(tensor: Any, replaced: Mapping[str, Replacement]) -> int:
    return int(replaced[tensor.name].data.nbytes if tensor.name in replaced else tensor.n_bytes)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(_padded(file.tell(), alignment) - file.tell()))
