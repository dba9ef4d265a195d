"""The weights under edit, in one orientation, with what is needed to undo and to keep small changes.

Canonical orientation: (out_features x in_features), rows are neurons. GPT-2's Conv1D stores the transpose; it is
turned here and nowhere else. A weight of less than 32 bits has a float32 master copy, to which updates are added,
so that thousands of small updates are not lost to rounding. A checksum of what was written last tells whether somebody
else has changed the model's own copy since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sphere.errors import SphereError

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHECKSUM_ENTRIES = 2**22  # whose bits are widened at a time


class EditedWeights:
    """Read, change, save and restore a few weight matrices of a model.

    Args:
        model: any module.
        names: parameter names such as "model.layers.4.mlp.down_proj.weight".

    Raises:
        SphereError: a name that the model does not have, a parameter that is no matrix, or one whose values are
            elsewhere (offloaded).
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self._parameters: dict[str, nn.Parameter] = {}
        self._transposed: dict[str, bool] = {}
        self._masters: dict[str, Tensor] = {}
        self._model = model
        self._written: dict[str, Tensor] = {}  # checksums
        for name in self.names:
            path, _, leaf = name.rpartition(".")
            try:
                module = model.get_submodule(path)
                parameter = getattr(module, leaf)
            except AttributeError as error:
                raise SphereError(
                    f"{type(model).__name__} has no weight '{name}': check rewrite_module_tmp and layers."
                ) from error
            if not isinstance(parameter, nn.Parameter) or parameter.ndim != 2:
                raise SphereError(
                    f"'{name}' of {type(model).__name__} is not a weight matrix: check rewrite_module_tmp."
                )
            if parameter.is_meta:
                raise SphereError(
                    f"The weight '{name}' is on the meta device, offloaded by device_map to the CPU or the disk: "
                    "edited layers must stay where they are computed; give a device_map that holds them, or a device.",
                    argument=("device_map", "device"),
                )
            self._parameters[name] = parameter
            self._transposed[name] = isinstance(module, Conv1D)
            if torch.finfo(parameter.dtype).bits < 32:
                self._masters[name] = parameter.detach().float()
            self._written[name] = checksum(parameter)

    def get(self, name: str) -> Tensor:
        """The weight as (out x in) in float32 or wider: a view for reading, not a copy."""
        stored = self._masters.get(name, self._parameters[name].data)
        return stored.T if self._transposed[name] else stored

    def add_(self, name: str, delta: Tensor) -> None:
        """Add a canonical (out x in) change to the weight."""
        with torch.no_grad():
            weight = self.get(name)
            if delta.shape != weight.shape:
                raise SphereError(
                    f"The update of '{name}' has shape {tuple(delta.shape)}, but the weight (out x in) has "
                    f"{tuple(weight.shape)}."
                )
            weight += delta.to(weight)
            self._publish(name)

    def set_(self, name: str, weight: Tensor) -> None:
        """Overwrite the weight with a canonical (out x in) matrix."""
        with torch.no_grad():
            self.get(name).copy_(weight)
            self._publish(name)

    def changed_elsewhere(self) -> list[str]:
        """Names of the weights that are no longer as this object read or wrote them last."""
        now = dict(self._model.named_parameters(remove_duplicate=False))
        return [
            name
            for name, parameter in self._parameters.items()
            if now.get(name) is not parameter or not torch.equal(checksum(parameter), self._written[name])
        ]

    @property
    def transposed(self) -> list[str]:
        """Names of the weights that the model stores as (in x out)."""
        return [name for name in self.names if self._transposed[name]]

    def is_finite(self, name: str) -> bool:
        """Whether the model's own copy of the weight, in its dtype, holds neither NaN nor infinity."""
        return bool(torch.isfinite(self._parameters[name]).all())

    def canonical(self, name: str, stored: Tensor) -> Tensor:
        """Turn a tensor in the model's own orientation into (out x in)."""
        return stored.T if self._transposed[name] else stored

    def stored(self) -> dict[str, Tensor]:
        """Copies in the model's own orientation and dtype, as a checkpoint keeps them, on the CPU."""
        return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in self._parameters.items()}

    def snapshot(self, device: str | torch.device | None = None) -> dict[str, Tensor]:
        """Exact copies of the weights (masters where there are some), in the model's own orientation."""
        sources = {n: self._masters.get(n, p.data) for n, p in self._parameters.items()}
        return {n: t.detach().to(device or t.device, copy=True).contiguous() for n, t in sources.items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put a snapshot (or a checkpoint's tensors) back, bit for bit.

        Raises:
            SphereError: a weight is missing or has another shape, e.g. a checkpoint of another model.
        """
        for name in self.names:
            if name not in snapshot or snapshot[name].shape != self._parameters[name].shape:
                found = tuple(snapshot[name].shape) if name in snapshot else "nothing"
                raise SphereError(
                    f"These weights do not fit this model: '{name}' should have shape "
                    f"{tuple(self._parameters[name].shape)}, found {found}; give the model that they were saved from."
                )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if name in self._masters:
                    self._masters[name].copy_(snapshot[name])
                parameter.copy_(snapshot[name])
                self._written[name] = checksum(parameter)

    @contextmanager
    def temporarily(self, device: str | torch.device | None = None) -> Iterator[None]:
        """Whatever is changed inside the block is undone at its end; `device` keeps the weights meanwhile."""
        before = self.snapshot(device)
        try:
            yield
        finally:
            self.restore(before)

    def _publish(self, name: str) -> None:
        if name in self._masters:
            self._parameters[name].data.copy_(self._masters[name])
        self._written[name] = checksum(self._parameters[name])


def checksum(weight: Tensor) -> Tensor:
    """Sum of the bits of each column of a matrix (rows x columns): (columns,), int64, on the CPU."""
    bits = weight.detach().view(BITS[weight.element_size()])
    blocks = bits.split(max(1, CHECKSUM_ENTRIES // bits.shape[1]))
    return torch.stack([block.sum(dim=0, dtype=torch.int64) for block in blocks]).sum(dim=0).cpu()
