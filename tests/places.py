"""Pretended devices: a model spread over "cuda:0" and "cuda:1" on a machine that has neither.

All tensors stay on the CPU; within `pretended_devices` each one has a place that it reports as its device, and an
operation on tensors of two places fails as PyTorch's own does. What PyTorch allows across devices is allowed: numbers
(0-dimensional CPU tensors), `copy_`, and indexing by CPU tensors. `place` puts a model's modules into places, with
hooks that bring inputs along, as accelerate's do for a device_map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
INDEXING = {
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.index_select,
    torch.index_select,
}


def place_of(tensor: Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    return getattr(tensor, "_place", CPU)


def _put(value: Any, where: torch.device) -> Any:
    if isinstance(value, Tensor):
        value._place = where
    return value


class _Places(TorchFunctionMode):
    """Keeps the places of all tensors that come and go."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return place_of(args[0])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and place_of(args[0]) != CPU:
            raise TypeError(f"can't convert {place_of(args[0])} device type tensor to numpy")
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
        if (
            func is torch._has_compatible_shallow_copy_type
        ):  # asked by `Module.to`, before it puts the copy in place
            return True
        if func == Tensor.data.__set__:
            _put(args[0], place_of(args[1]))
        if func is Tensor.copy_ or func is Tensor.set_:
            return func(*args, **kwargs)
        if func.__name__.startswith("_foreach"):  # element by element, each where it is
            results = func(*args, **kwargs)
            for result, source in zip(results or (), args[0], strict=bool(results)):
                _put(result, place_of(source))
            return results
        if func is torch.autograd.grad:
            return self._gradients(func, *args, **kwargs)
        where = self._common(func, args, kwargs)
        result = func(*args, **kwargs)
        where = torch.device(asked) if asked is not None else where
        tree_map(lambda leaf: self._settle(leaf, where), result)
        return result

    def _gradients(
        self, func: Any, outputs: Any, inputs: Any, grad_outputs: Any = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Each gradient is where its input is, whatever lay between it and the output."""
        self._common(func, (outputs, grad_outputs), {})
        found = func(outputs, inputs, grad_outputs, **kwargs)
        sources = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        return tuple(_put(own, place_of(source)) for own, source in zip(found, sources, strict=True))

    def _settle(self, leaf: Any, where: torch.device) -> None:
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            _put(leaf, where)

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        source, where = args[0], place_of(args[0])
        if func is Tensor.cpu:
            where, args = CPU, (source,)
        rest = []
        for value in args[1:]:
            if isinstance(value, Tensor):
                where = place_of(value)
                rest.append(value)
            elif isinstance(value, (str, torch.device)):
                where = torch.device(value)
            elif isinstance(value, torch.dtype):  # no bools: whether to block or to copy
                rest.append(value)
        if kwargs.get("device") is not None:
            where = torch.device(kwargs.pop("device"))
        if where == place_of(source) and not rest and not kwargs:
            return source
        if func is not Tensor.to or not (rest or kwargs):
            moved = source
        else:
            moved = func(source, *([CPU] if not rest else []), *rest, **kwargs)
        if moved is source and where != place_of(source):
            moved = source.clone()
        return _put(moved, where)

    def _common(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in INDEXING and tensors:  # a CPU index, and a CPU number as value, go anywhere
            tensors = tensors[:1] + [t for t in tensors[1:] if place_of(t) != CPU]
        places = {place_of(t) for t in tensors if t.ndim or place_of(t) != CPU}
        if len(places) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(sorted(map(str, places)))}! (in {getattr(func, '__name__', func)})"
            )
        return places.pop() if places else CPU


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Within the block tensors have places."""
    with _Places():
        yield


def place(model: nn.Module, device_map: Mapping[str, str]) -> nn.Module:
    """Put modules (by the longest prefix of their name) into places; inputs follow, as under accelerate's hooks."""

    def send(value: Any, where: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(where)
        if isinstance(value, (tuple, list)):
            return type(value)(send(v, where) for v in value)
        if isinstance(value, dict):
            return {k: send(v, where) for k, v in value.items()}
        return value

    for name, where in device_map.items():
        module, device = model.get_submodule(name), torch.device(where)
        for tensor in [*module.parameters(), *module.buffers()]:
            _put(tensor, device)

        def forward(*args: Any, _inner=module.forward, _device=device, **kwargs: Any) -> Any:
            return _inner(*send(args, _device), **send(kwargs, _device))

        module.forward = forward
    return model
