"""Running parts of a model: only the layers that matter, on only the positions that matter.

A model is reached by the module templates of its hyperparameters alone. One pass through the model records how each
decoder layer is called (masks, rotary embeddings, caches); later the wanted layers are called again in the same way on
other hidden states. Works for any decoder whose layers return a tensor or a tuple that starts with one. Knows nothing
of editing.
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sphere.errors import SphereError
from sphere.forward.checks import alike, check_logits, check_matrix
from sphere.forward.head import logits_of
from sphere.forward.modules import by_position, hidden_of, only_at, passed_on
from sphere.forward.packing import Scored
from sphere.forward.padding import PASS_OVERHEAD
from sphere.forward.prefix_cache import FrozenPrefixCache
from sphere.forward.scorer import PackedScorer
from sphere.hparams import ModuleHParams
from sphere.models import check_architecture


class _Stop(Exception):
    """Leaves a forward pass as soon as all that was wanted from it is at hand."""


@dataclass
class RecordedCalls:
    """What a pass left behind: hidden states entering layer `first` and how each later layer was called.

    Attributes:
        hidden: (batch x positions x d), entering layer `first`.
        calls: layer -> (positional arguments after the hidden state, keyword arguments).
    """

    hidden: Tensor
    first: int
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]

    def select(self, rows: Tensor) -> RecordedCalls:
        """The same calls for some rows of the batch.

        Args:
            rows: (n,) indices into the batch.
        """
        batch = self.hidden.shape[0]
        seen: dict[int, Any] = {}  # layers share masks: cut each once

        def cut(value: Any) -> Any:
            if id(value) in seen:
                return seen[id(value)]
            result = value
            if isinstance(value, Tensor):
                if value.ndim >= 2 and value.shape[0] == batch:
                    result = value[rows.to(value.device)]
            elif isinstance(value, tuple | list):
                result = type(value)(cut(v) for v in value)
            elif isinstance(value, dict | UserDict):  # the latter holds keys and values that layers share
                result = type(value)({k: cut(v) for k, v in value.items()})
            seen[id(value)] = result
            return result

        calls = {layer: (cut(args), cut(kwargs)) for layer, (args, kwargs) in self.calls.items()}
        return RecordedCalls(self.hidden[rows.to(self.hidden.device)], self.first, calls)


class LayerStack:
    """A model's decoder layers, reached by templates.

    Raises:
        SphereError: a module that does not exist, or a layer out of range; the message names the key to correct.
    """

    def __init__(self, model: nn.Module, hparams: ModuleHParams) -> None:
        check_architecture(model)
        self.model: Any = model
        self.hparams = hparams
        self.layers = self._find_layers()
        self.n_layers = len(self.layers)
        last = self.n_layers - 1
        wanted = [("layers", layer) for layer in hparams.layers]
        if hasattr(hparams, "v_loss_layer"):
            wanted.append(("v_loss_layer", hparams.v_loss_layer))
        for key, layer in wanted:
            if not 0 <= layer <= last:
                raise SphereError(
                    f"{key} names layer {layer}, but {type(model).__name__} has layers 0 to {last} at "
                    f"'{hparams.layer_module_tmp}': correct {key} in the hyperparameter file."
                )
        self.ln_f = self._module("ln_f_module", hparams.ln_f_module)
        self.lm_head = self._find_head()
        paths = {layer: hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers}
        for path in paths.values():
            check_matrix(model, path)
        self.rewrite = {layer: self._module("rewrite_module_tmp", path) for layer, path in paths.items()}
        self._scorer = PackedScorer(model)
        self._alike: dict[
            int, bool
        ] = {}  # layer -> whether its MLP treats positions alike, as far as it was asked
        if self.device.type != "meta":
            check_logits(model, self.layers[-1], self.logits, hparams.ln_f_module)
        self.plain_layers: dict[int, bool] = {}  # found out by `sphere.forward.remaining.adds_as_is`

    def takes_trees(self, ids: Sequence[int]) -> bool:
        """Whether the model heeds the masks of prefix trees (`sphere.forward.packing`) in sequences as long as this."""
        return self._scorer.takes_trees([Scored(tuple(ids), 1)])

    def weight_name(self, layer: int) -> str:
        """Name of the edited parameter of a layer."""
        return self.hparams.rewrite_module_tmp.format(layer) + ".weight"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def cache_argument(self) -> str:
        """What the model calls the keys and values of earlier positions: `cache` from transformers 5.24 on."""
        named = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in named else "past_key_values"

    @property
    def pass_overhead(self) -> int:
        """What a forward pass costs beside its tokens, as a number of tokens: see `group_by_length`."""
        return PASS_OVERHEAD.get(self.device.type, PASS_OVERHEAD["cuda"])

    @property
    def devices(self) -> dict[int, torch.device]:
        """Edited layer -> where its edited module computes."""
        return {layer: next(module.parameters()).device for layer, module in self.rewrite.items()}

    def record(self, inputs: dict[str, Any], first: int, last: int) -> RecordedCalls:
        """Run the model up to layer `last`, keeping what enters layer `first` and the calls of layers first..last.

        `first` may be one above `last`: then the output of layer `last` is kept and there are no calls. These layers
        are called, but compute nothing unless `first` is 0: how they are called does not depend on what enters them.
        Nothing above `last` is called.

        Args:
            inputs: keyword arguments of the model (input_ids, attention_mask, position_ids, its cache, ...).
        """
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        entering: list[Tensor] = []

        def before(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs["hidden_states"]
                    kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                if layer == first:
                    entering.append(hidden)
                calls[layer] = (args, kwargs)
                if layer == last:
                    raise _Stop

            return hook

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            entering.append(hidden_of(output))
            raise _Stop

        with ExitStack() as hooks:
            for layer in range(first, min(last + 1, self.n_layers)):
                handle = self.layers[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
                hooks.callback(handle.remove)
            if first > last:
                hooks.callback(self.layers[last].register_forward_hook(after).remove)
            elif first > 0:
                form: list[Any] = []
                handle = self.layers[first - 1].register_forward_hook(lambda *call: form.append(call[-1]))
                hooks.callback(handle.remove)
                hooks.enter_context(passed_on(self.layers[first:last], form))
            self._forward(inputs)
        return RecordedCalls(entering[0], first, calls)

    def fill_cache(self, inputs: dict[str, Any]) -> FrozenPrefixCache:
        """Attention keys and values of all layers for these inputs, frozen; no logits are computed.

        Earlier positions may be given as the model's `cache_argument`; they are part of what is returned.
        """
        cache = inputs.get(self.cache_argument)
        cache = FrozenPrefixCache() if cache is None else cache
        cache.frozen = False

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            raise _Stop

        handle = self.layers[-1].register_forward_hook(after)
        try:
            self._forward({**inputs, self.cache_argument: cache, "use_cache": True})
        finally:
            handle.remove()
        return cache.freeze()

    def run(self, recorded: RecordedCalls, hidden: Tensor, first: int, last: int) -> Tensor:
        """Layers first..last (inclusive) on `hidden`, called as recorded.

        Args:
            hidden: (batch x positions x d) entering layer `first`.

        Returns:
            (batch x positions x d) leaving layer `last`.
        """
        for layer in range(first, last + 1):
            args, kwargs = recorded.calls[layer]
            hidden = hidden_of(self.layers[layer](hidden, *args, **kwargs))
        return hidden

    def run_at(
        self, recorded: RecordedCalls, hidden: Tensor, first: int, last: int, row: Tensor, position: Tensor
    ) -> Tensor:
        """As `run`, but only what leaves layer `last` at (row, position): (n x d).

        Args:
            row, position: (n,) each, no pair twice.
        """
        if last >= first:
            hidden = self.run(recorded, hidden, first, last - 1)
            cut = self._mlp(last) if self._treats_alike(recorded, hidden, last, row, position) else None
            with only_at(cut, row, position, hidden.shape[:2]):
                hidden = self.run(recorded, hidden, last, last)
        return _at(hidden, row, position)

    @torch.no_grad()
    def _treats_alike(
        self, recorded: RecordedCalls, hidden: Tensor, layer: int, row: Tensor, position: Tensor
    ) -> bool:
        """Whether a layer's MLP gives the same at (row, position), run there only; asked with its first call."""
        mlp = self._mlp(layer)
        if mlp is None or hidden.is_meta:  # shapes without values show nothing
            return mlp is not None
        if layer not in self._alike:
            expected, found = _at(self.run(recorded, hidden, layer, layer), row, position), None
            errors = (RuntimeError, ValueError, TypeError, IndexError)
            with suppress(*errors), only_at(mlp, row, position, hidden.shape[:2]):
                found = _at(self.run(recorded, hidden, layer, layer), row, position)
            self._alike[layer] = found is not None and alike(found, expected, hidden.dtype)
        return self._alike[layer]

    def module_input(self, recorded: RecordedCalls, hidden: Tensor, layer: int) -> Tensor:
        """The input of the edited module of `layer`, for hidden states entering that layer.

        Returns:
            (batch x positions x in)
        """
        captured: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            captured.append(args[0])
            raise _Stop

        handle = self.rewrite[layer].register_forward_pre_hook(before)
        try:
            self.run(recorded, hidden, layer, layer)
        except _Stop:
            pass
        finally:
            handle.remove()
        return by_position(captured[0], hidden.shape[:2], self.hparams.rewrite_module_tmp.format(layer))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and the model's own way to its logits for (... x d) hidden states: (... x vocabulary), float32."""
        return logits_of(self.model, self._decoders, self.ln_f(hidden)).float()

    def module_inputs(self, inputs: dict[str, Any]) -> dict[int, Tensor]:
        """One pass that stops at the highest edited layer: layer -> input of its edited module (batch x pos x in)."""
        captured: dict[int, Tensor] = {}
        highest = max(self.rewrite)

        def before(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                captured[layer] = args[0]
                if layer == highest:
                    raise _Stop

            return hook

        with ExitStack() as hooks:
            for layer, module in self.rewrite.items():
                hooks.callback(module.register_forward_pre_hook(before(layer)).remove)
            self._forward(inputs)
        shape, path = inputs["input_ids"].shape, self.hparams.rewrite_module_tmp
        return {layer: by_position(x, shape, path.format(layer)) for layer, x in captured.items()}

    def _mlp(self, layer: int) -> nn.Module | None:
        """A layer's MLP, where the hyperparameters say which it is."""
        with suppress(AttributeError):
            return self.model.get_submodule(self.hparams.mlp_module_tmp.format(layer) or "?")
        return None

    def _forward(self, inputs: dict[str, Any]) -> None:
        with suppress(_Stop):
            self.model(**inputs)

    @cached_property
    def _decoders(self) -> list[nn.Module]:
        """The modules around the layers, the model aside, outermost first."""
        parts = self.hparams.layer_module_tmp.partition("{}")[0].split(".")[:-1]
        return [self.model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]

    def _find_head(self) -> nn.Module:
        """The model's head, which may be named by the embedding that it is tied to."""
        name = self.hparams.lm_head_module
        found: Any = self._module("lm_head_module", name)
        own = getattr(self.model, "get_output_embeddings", lambda: None)()
        if own is None or own is found:
            return found
        if getattr(found, "weight", None) is not own.weight:
            raise SphereError(
                f"'{name}' is not the head of {type(self.model).__name__}: correct lm_head_module in the "
                "hyperparameter file."
            )
        return own

    def _find_layers(self) -> list[nn.Module]:
        template = self.hparams.layer_module_tmp
        found: list[nn.Module] = []
        while True:
            try:
                found.append(self.model.get_submodule(template.format(len(found))))
            except AttributeError:
                break
        if not found:
            self._module("layer_module_tmp", template.format(0))
        return found

    def _module(self, key: str, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise SphereError(
                f"{type(self.model).__name__} has no module '{path}': correct {key} in the hyperparameter file."
            ) from error


def _at(hidden: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """(batch x positions x d) -> (n x d) at (row, position)."""
    return hidden[row.to(hidden.device), position.to(hidden.device)]
