"""Where a decoder's parts are: the module templates of its hyperparameters, found in the model itself.

Known families are in a table; any other model is searched by its structure. Knows modules and their shapes, and nothing
of layers to edit or of numbers. The values, weights on the meta device included, do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from sphere.errors import SphereError
from sphere.models import check_architecture


@dataclass(frozen=True)
class ModuleTemplates:
    """The paths of a model's parts, `{}` standing for the layer's number, as hyperparameter files spell them.

    Attributes:
        rewrite_module_tmp: the output projection of the MLP, (d x in).
        mlp_module_tmp: the MLP, a child of its layer; "" where its parts are the layer's own, or where it is handed
            more than the hidden states and so cannot be run at some positions only.
        n_layers: number of decoder layers.
        editable: those that have the module to rewrite, increasing.
        found_by: "model_type" (the table) or "structure" (the search).
    """

    rewrite_module_tmp: str
    layer_module_tmp: str
    mlp_module_tmp: str
    attn_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    n_layers: int
    editable: tuple[int, ...]
    found_by: str

    def to_dict(self) -> dict[str, str]:
        """The keys of a hyperparameter file."""
        return {key: value for key, value in vars(self).items() if key.endswith(("_tmp", "_module"))}


@dataclass(frozen=True)
class Family:
    """How the decoders of one family name their parts; `rewrite`, `mlp` and `attn` are within a layer."""

    layers: str
    rewrite: str
    mlp: str
    attn: str
    ln_f: str


LLAMA = Family("model.layers", "mlp.down_proj", "mlp", "self_attn", "model.norm")
GPT2 = Family("transformer.h", "mlp.c_proj", "mlp", "attn", "transformer.ln_f")
GPTJ = Family("transformer.h", "mlp.fc_out", "mlp", "attn", "transformer.ln_f")
# `config.model_type` of the text model -> its family.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 cohere cohere2 granite stablelm "
            "phi3 smollm3 glm glm4 exaone4 helium ernie4_5 seed_oss"
        ).split(),
        LLAMA,
    ),
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode"), GPT2),
    **dict.fromkeys(("gptj", "codegen"), GPTJ),
    "bloom": Family("transformer.h", "mlp.dense_4h_to_h", "", "self_attention", "transformer.ln_f"),
    "falcon": Family("transformer.h", "mlp.dense_4h_to_h", "mlp", "self_attention", "transformer.ln_f"),
    "gpt_neox": Family(
        "gpt_neox.layers", "mlp.dense_4h_to_h", "mlp", "attention", "gpt_neox.final_layer_norm"
    ),
    "opt": Family("model.decoder.layers", "fc2", "", "self_attn", "model.decoder.final_layer_norm"),
    "phi": Family("model.layers", "mlp.fc2", "mlp", "self_attn", "model.final_layernorm"),
    "starcoder2": Family("model.layers", "mlp.c_proj", "mlp", "self_attn", "model.norm"),
    "qwen2_moe": Family("model.layers", "mlp.shared_expert.down_proj", "mlp", "self_attn", "model.norm"),
    "mpt": Family("transformer.blocks", "ffn.down_proj", "", "attn", "transformer.norm_f"),
}
MLP_NAMES = ("mlp", "ffn", "feed_forward", "feedforward")
ATTENTION_NAMES = ("attn", "attention")


def module_templates(model: nn.Module, use_table: bool = True) -> ModuleTemplates:
    """The module templates of a decoder.

    Args:
        model: a causal language model of transformers, or one with the same `config` and `get_output_embeddings`.
        use_table: look its family up first; else, and where the table does not fit, its structure is searched.

    Raises:
        SphereError: no decoder of attention and MLP layers (see also `check_architecture`), or no single matrix per
            layer that an MLP writes with (a mixture of experts without a dense shared one).
    """
    check_architecture(model)
    config: Any = model.config
    text: Any = config.get_text_config(decoder=True)
    n_layers, width = text.num_hidden_layers, text.hidden_size
    found_by, found = "model_type", None
    if use_table and (family := FAMILIES.get(text.model_type)):
        found = _fits(model, family, n_layers, width)
    if found is None:
        found_by, found = "structure", _search(model, n_layers, width)
    family, editable = found
    layer = f"{family.layers}.{{}}"
    return ModuleTemplates(
        rewrite_module_tmp=f"{layer}.{family.rewrite}",
        layer_module_tmp=layer,
        mlp_module_tmp=f"{layer}.{family.mlp}" if family.mlp else "",
        attn_module_tmp=f"{layer}.{family.attn}" if family.attn else "",
        ln_f_module=family.ln_f,
        lm_head_module=_head_path(model),
        n_layers=n_layers,
        editable=editable,
        found_by=found_by,
    )


def _fits(
    model: nn.Module, family: Family, n_layers: int, width: int
) -> tuple[Family, tuple[int, ...]] | None:
    """The family with the layers that have its module to rewrite; None where a part is not where it should be."""
    parts = dict(model.named_modules(remove_duplicate=False))
    layers = parts.get(family.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) != n_layers or family.ln_f not in parts:
        return None
    editable = []
    for number in range(n_layers):
        inner = [parts.get(f"{family.layers}.{number}.{name}") for name in (family.mlp, family.attn) if name]
        projection = parts.get(f"{family.layers}.{number}.{family.rewrite}")
        if None not in inner and _is_linear(projection) and _shape(projection)[0] == width:
            editable.append(number)
    return (family, tuple(editable)) if editable else None


# ---- the search by structure ----


def _search(model: nn.Module, n_layers: int, width: int) -> tuple[Family, tuple[int, ...]]:
    """A family of one model's own.

    Args:
        n_layers: of the configuration: how long the list of layers is.
        width: d, what an MLP's output projection gives.
    """
    name = type(model).__name__
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    lists = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    with_attention = [path for path in lists if any(_attention(layer) for layer in _children(model, path))]
    if not with_attention:
        reason = "none of them has attention" if lists else "no list of its modules is as long"
        raise SphereError(
            f"{name} has no decoder layers that can be edited: its configuration says {n_layers} layers, and {reason}; "
            "for a decoder of an unusual make, write its module paths into a hyperparameter file."
        )
    written = {path: _written_with(model, path, width) for path in with_attention}
    if not any(written.values()):
        raise SphereError(
            f"No matrix in a layer of {name} is what its MLP writes {width} values with: a mixture of experts whose "
            "experts share one tensor, without a dense shared expert, cannot be edited."
        )
    layers = max(written, key=lambda path: len(written[path]))
    rewrite, _ = Counter(written[layers].values()).most_common(1)[0]
    editable = tuple(number for number, found in written[layers].items() if found == rewrite)
    layer = model.get_submodule(layers)[editable[0]]  # type: ignore[index]
    child = rewrite.partition(".")[0]
    family = Family(
        layers=layers,
        rewrite=rewrite,
        mlp=child if child != rewrite and _takes_one(layer.get_submodule(child)) else "",
        attn=_attention(layer) or "",
        ln_f=_final_norm(model, layers),
    )
    return family, editable


def _takes_one(module: nn.Module) -> bool:
    """Whether a module is called with hidden states alone."""
    needed = [p for p in signature(module.forward).parameters.values() if p.default is p.empty]
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in needed) == 1


def _children(model: nn.Module, path: str) -> Iterator[nn.Module]:
    return iter(model.get_submodule(path).children())


def _attention(layer: nn.Module) -> str | None:
    """The name of the child of a layer that is, or holds, its attention."""
    for name, child in layer.named_children():
        called = _called(name, child)
        if any(word in called for word in ATTENTION_NAMES) and any(map(_is_linear, child.modules())):
            return name
    return None


def _written_with(model: nn.Module, layers: str, width: int) -> dict[int, str]:
    """Layer -> path, within it, of the output projection of its MLP; layers without one are left out."""
    found = {}
    for number, layer in enumerate(_children(model, layers)):
        outside = [
            (name, module)
            for name, module in layer.named_modules()
            if _is_linear(module)
            and not any(part.isdigit() for part in name.split("."))  # one of many: a routed expert
            and not _mixes_positions(layer, name)
        ]
        named = [(name, module) for name, module in outside if _within(layer, name, MLP_NAMES)]
        writing = [name for name, module in named or outside if _shape(module)[0] == width]
        if writing:
            found[number] = writing[-1]
    return found


def _mixes_positions(layer: nn.Module, path: str) -> bool:
    """Whether a module of a layer lies in its attention, or in what takes its place: a block with a convolution."""
    block = layer.get_submodule(path.rpartition(".")[0])
    convolves = any(isinstance(module, nn.Conv1d) for module in block.children())
    return convolves or _within(layer, path, ATTENTION_NAMES)


def _within(layer: nn.Module, path: str, words: tuple[str, ...]) -> bool:
    """Whether a module of a layer, or one that it lies in, is called by one of these words."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        called = _called(parts[end - 1], layer.get_submodule(".".join(parts[:end])))
        if any(word in called for word in words):
            return True
    return False


def _called(name: str, module: nn.Module) -> str:
    """A module's name and its class, in lower case; norms stand beside what they are named after, and are nothing."""
    kind = type(module).__name__.lower()
    return "" if "norm" in kind else f"{name.lower()} {kind}"


def _final_norm(model: nn.Module, layers: str) -> str:
    """The norm beside the list of layers: the first after it, else the last before it that is not the embeddings'."""
    parent, _, own = layers.rpartition(".")
    before: list[str] = []
    after: list[str] = []
    side = before
    for name, child in model.get_submodule(parent).named_children():
        if name == own:
            side = after
        elif "norm" in type(child).__name__.lower():
            side.append(name)
    norms = after[:1] or [name for name in before if "embed" not in name][-1:]
    if not norms:
        raise SphereError(
            f"{type(model).__name__} has no final norm beside '{layers}': write ln_f_module into a hyperparameter "
            "file."
        )
    return f"{parent}.{norms[0]}" if parent else norms[0]


def _head_path(model: nn.Module) -> str:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    paths = [path for path, module in model.named_modules() if module is head]
    if not paths:
        raise SphereError(
            f"{type(model).__name__} has no output head (get_output_embeddings): load a causal language model."
        )
    return paths[0]


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _shape(module: Any) -> tuple[int, int]:
    """(out, in), whichever way round the weight is stored."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)
