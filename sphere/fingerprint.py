"""Fingerprints of models: equal only for equal weights. Knows parameters; knows nothing of what is done with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters: equal only for equal weights."""
    return Fingerprint(model).now()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's shape, dtype and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Fingerprint:
    """The fingerprint of a model of which only a few parameters change: the others are read once.

    Args:
        changing: names of the parameters that are read anew each time.
        dtype: as if the model had been cast to it; None: as it is.
    """

    def __init__(
        self, model: nn.Module, changing: Iterable[str] = (), dtype: torch.dtype | None = None
    ) -> None:
        self._model, self._dtype = model, dtype
        self._names = [name for name, _ in model.named_parameters()]
        self._changing = set(changing)
        self._digests: dict[str, str] = {}

    def now(self) -> str:
        """SHA-256 over the weights as they stand."""
        todo: dict[str, list[str]] = {}  # module -> names of its parameters
        for name in self._names:
            if name not in self._digests or name in self._changing:
                todo.setdefault(name.rpartition(".")[0], []).append(name)
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets other threads run
            for digests in pool.map(self._digest, todo, todo.values()):
                self._digests |= digests
        lines = (f"{name} {self._digests[name]}" for name in self._names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _digest(self, path: str, names: Sequence[str]) -> dict[str, str]:
        module, result = self._model.get_submodule(path), {}
        with align_module_device(module):  # brings weights that a device_map has put on the disk
            for name in names:
                parameter = getattr(module, name.rpartition(".")[2]).detach()
                result[name] = tensor_digest(parameter.to(self._dtype) if self._dtype else parameter)
        return result
