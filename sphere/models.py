"""Loading a model and its tokenizer by name, path or hub id, on any device.

Knows where models come from. It knows nothing of their inside: modules are reached by the templates of the
hyperparameters (`sphere.forward.layers`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sphere.embedded import DEFAULT_MODEL, EMBEDDED, assemble, part_files
from sphere.errors import SphereError, first_line
from sphere.kept_folders import cache_folder, kept_folder

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # of spreading layers over devices
KEPT = 2  # how embedded models are made from their GGUF files; with another number they are made anew


def load_model(
    name: str = DEFAULT_MODEL,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model for editing: evaluation mode, no gradients on its parameters.

    Args:
        name: an embedded model ("SmolLM2-135M", "gemma-3-270m"), a folder, a .gguf file, or a Hugging Face hub id.
        device: "auto" (CUDA where there is one, else CPU) or any torch device, e.g. "cuda:1".
        dtype: "auto" (the checkpoint's own on a GPU, float32 on CPU and for GGUF files), or one of DTYPES.
        device_map: spreads the layers over devices as in transformers; overrides `device`.

    Raises:
        SphereError: unknown model, device or dtype, or a model that cannot be read.
    """
    target = resolve_device(device)
    options = _source(name)
    options["dtype"] = _resolve_dtype(dtype, target, gguf="gguf_file" in options)
    source = options.pop("source")
    if device_map is not None:
        _check_device_map(device_map)
        options["device_map"] = device_map
    try:
        from_file = {k: v for k, v in options.items() if k == "gguf_file"}
        config = AutoConfig.from_pretrained(source, **from_file)
        _check_decoder_only(config, f"'{name}'")
        tokenizer = _tokenizer(name, source, **from_file)
        model, report = _load(source, options | {"config": config})
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise SphereError(
            f"Cannot load a causal language model from '{name}' ({first_line(error)}): give a folder with config.json "
            f"and weights, a hub id, or '{DEFAULT_MODEL}'.",
            argument="model_name",
        ) from error
    _check_weights(model, name, report)
    if hasattr(model.config, "quantization_config"):  # dequantised already; save_pretrained would refuse
        del model.config.quantization_config
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
    if device_map is None:
        nn.Module.to(model, target)
    model.eval().requires_grad_(False)
    log.info("model %s: %s, %s on %s", name, type(model).__name__, model.dtype, device_map or target)
    return model, tokenizer


def load_tokenizer(name: str = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights.

    Raises:
        SphereError: unknown model, or a tokenizer that cannot be read.
    """
    return _tokenizer(name, **_source(name))


def _tokenizer(name: str, source: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is read from `source`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if "gguf_file" in options and tokenizer.bos_token == tokenizer.eos_token:
            _take_tokens(tokenizer, Path(source, options["gguf_file"]))
        return tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise SphereError(
            f"Cannot load the tokenizer of '{name}' ({first_line(error)}): give a folder with its files, a hub id, or "
            f"'{DEFAULT_MODEL}'.",
            argument="model_name",
        ) from error


def _take_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer the special tokens that its GGUF file names.

    Some versions of transformers (5.17 is one) take BOS for EOS as well in files of Llama's kind, and no padding.
    """
    from gguf import GGUFReader, Keys

    own, reader = Keys.Tokenizer, GGUFReader(path)
    for name, key in (("bos_token", own.BOS_ID), ("eos_token", own.EOS_ID), ("pad_token", own.PAD_ID)):
        if (field := reader.get_field(key)) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))


def meta_model(name: str, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A model of the same shape on the meta device, from its configuration alone: no weights are read.

    Args:
        name: as for `load_model`; of a folder only config.json is read.
        dtype: as for `load_model`.
        device: the type of device that it is to be loaded on ("cpu", "cuda"), which need not be there.

    Raises:
        SphereError: no configuration of a causal language model.
    """
    options = _source(name)
    source = options.pop("source")
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_decoder_only(config, f"'{name}'")
        wanted = _resolve_dtype(dtype, torch.device(device), gguf="gguf_file" in options)
        if wanted == "auto":
            wanted = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SphereError(
            f"Cannot read the configuration of a causal language model from '{name}' ({first_line(error)}): give a "
            "folder that holds its config.json, or a hub id where the hub can be reached.",
            argument="model_name",
        ) from error
    return model.eval().requires_grad_(False)


def _load(source: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and what its weights files lacked or held in other shapes."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    return loaded


def _check_weights(model: PreTrainedModel, name: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that are made up where a file lacked them, and weights that are no numbers."""
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    if wrong := sorted({*report["missing_keys"], *mismatched}):
        raise SphereError(
            f"The weights of '{name}' do not fit its config.json: {len(wrong)} are missing or of another shape, the "
            f"first is '{wrong[0]}'; get the model's files anew."
        )
    for key, weight in model.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise SphereError(
                f"The weight '{key}' of '{name}' holds values that are not finite: get the model's files anew, or use "
                "dtype bfloat16 or float32.",
                argument="dtype",
            )


def resolve_device(device: str) -> torch.device:
    """Turn "auto" or a torch device string into a device that exists here and can do what editing needs.

    Raises:
        SphereError: no such device, or one without the float64 that second moments and solves are made in.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, ValueError):
        reason = "PyTorch knows no such device"
    else:
        reason = _unusable(resolved)
    if reason:
        raise SphereError(
            f"Device '{device}' is not available here ({reason}): use auto or cpu.", argument="device"
        )
    return resolved


def _unusable(device: torch.device) -> str:
    """Why a device cannot be used, in a few words; "" where it can."""
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        return f"CUDA devices found: {count}"
    if device.type == "mps":
        return "it has no float64, which second moments and solves need"
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except Exception:  # each backend raises its own kind, some with a list of all backends
        return f"PyTorch computes nothing in float64 on {device.type}"
    return ""


def _check_device_map(device_map: str | dict[str, Any]) -> None:
    """Refuse a device_map that names a device which cannot be used here.

    Args:
        device_map: a strategy of accelerate, one device for all, or module -> device, "cpu", "disk" or a GPU's number.
    """
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        if isinstance(place, int):
            place = f"cuda:{place}"
        if str(place) in (*STRATEGIES, "disk"):
            continue
        try:
            resolve_device(str(place))
        except SphereError as error:
            reason = str(error).partition(": use")[0]
            raise SphereError(
                f"{reason}: let device_map be one of {', '.join(STRATEGIES)}, or name devices that are here.",
                argument="device_map",
            ) from None


def check_architecture(model: Any) -> None:
    """Refuse a model whose layers are no decoder's with attention alone, which is asked of the model itself.

    Raises:
        SphereError: an encoder-decoder, or layers that keep a recurrent state.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    if not isinstance(config, PretrainedConfig):
        return
    _check_decoder_only(config, name)
    recurrent = [i for i, is_linear in enumerate(DynamicCache(config=config).is_linear) if is_linear]
    if recurrent or getattr(model, "_is_stateful", False):
        where = f"{len(recurrent)} of its layers" if recurrent else "its layers"
        raise SphereError(
            f"{name} cannot be edited: {where} keep a recurrent state in place of attention keys and values, so that "
            "no part of a prompt can be run by itself; choose a model with attention in every layer.",
            argument="model_name",
        )


def _check_decoder_only(config: PretrainedConfig, name: str) -> None:
    """`name` is the model's, for the message; a class of its decoder alone counts as its whole."""
    if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False) is True:
        raise SphereError(
            f"{name} is an encoder-decoder ({config.model_type}): prompts and targets are edited and scored as one "
            "sequence, which takes a decoder-only language model; choose one.",
            argument="model_name",
        )


def model_label(name: str) -> str:
    """The short name used in result folders: the last part of a path or hub id."""
    path = Path(name)
    return path.stem if path.suffix == ".gguf" else path.name or path.resolve().name


def _resolve_dtype(dtype: str, device: torch.device, gguf: bool) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if gguf or device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise SphereError(
            f"Unknown dtype '{dtype}': use auto or one of {', '.join(DTYPES)}.", argument="dtype"
        )
    return DTYPES[dtype]


def _source(name: str) -> dict[str, Any]:
    """Where `name` is to be read from, as arguments of `from_pretrained`."""
    path = Path(name)
    if name in EMBEDDED and not path.exists():
        return _embedded_source(name)
    if path.is_file() and path.suffix == ".gguf":
        return {"source": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SphereError(
                f"The folder {path} holds no model (no config.json): give one that does.",
                argument="model_name",
            )
        return {"source": str(path)}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SphereError(
            f"No model at {path}: give a folder, a hub id such as Qwen/Qwen2.5-7B-Instruct, or '{DEFAULT_MODEL}'.",
            argument="model_name",
        )
    return {"source": name}


def _embedded_source(name: str) -> dict[str, Any]:
    """The folder in the user's cache that an embedded model is read from, made from its GGUF file the first time.

    It holds weights and tokenizer as they are read from that file, bit for bit. Reading a GGUF file takes most of a
    minute, each time: its metadata, with the vocabulary, is read entry by entry, and more than once.
    """
    embedded = EMBEDDED[name]

    def make(folder: Path) -> None:
        log.info(
            "%s is read from its GGUF file and kept in %s, once. %s.", name, cache_folder(), embedded.licence
        )
        whole = folder / f"{name}.gguf"
        assemble(part_files(name), whole, embedded.sha256)
        model, tokenizer = load_model(str(whole), device="cpu", dtype="float32")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        whole.unlink()

    key = f"{name}-{embedded.sha256[:16]}-{KEPT}-transformers-{transformers.__version__}"
    return {"source": str(kept_folder(key, make))}
