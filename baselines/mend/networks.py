"""The editor's networks: gradient factors in, weight updates out (MEND, section 3.2).

Knows tensors, their saving and loading. Knows nothing of models, data or training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sphere.errors import SphereError, first_line
from sphere.files import atomic_path, write_json

from .factors import Factors

Shape = tuple[int, int]  # (out, in) of a weight


class RunningNorm(nn.Module):
    """Standardises features by the mean and variance of all that it was shown in training (Welford's sums)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("squares", torch.zeros(features))  # sum of squared deviations

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take x (tokens x features) into the statistics."""
        n = len(x)
        if not n:
            return
        total = self.count + n
        mean = x.mean(dim=0)
        gap = mean - self.mean
        self.squares += ((x - mean) ** 2).sum(dim=0) + gap**2 * float(self.count * n / total)
        self.mean += gap * float(n / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens x features), standardised; unchanged before anything was observed."""
        if self.count < 2:
            return x
        deviation = (self.squares / (self.count - 1).to(self.squares)).sqrt()
        return (x - self.mean) / (deviation + 1e-7)


class LowRankBlock(nn.Module):
    """h = x + sigma(s_l * (U V x + b) + o_l) (eq. 3), with scale s_l and shift o_l of each layer.

    U starts at zero, so the block starts as the identity. sigma is GELU: ReLU, as published, has no gradient there.
    """

    def __init__(self, features: int, rank: int, n_layers: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(rank, features) / math.sqrt(features))
        self.u = nn.Parameter(torch.zeros(features, rank))
        self.bias = nn.Parameter(torch.zeros(features))
        self.scale = nn.Parameter(torch.ones(n_layers, features))
        self.shift = nn.Parameter(torch.zeros(n_layers, features))

    def forward(self, x: Tensor, place: int) -> Tensor:
        """(tokens x features) -> the same; `place` is the layer's among those that share the network."""
        low = x @ self.v.T  # tokens x rank
        return x + F.gelu(self.scale[place] * (low @ self.u.T + self.bias) + self.shift[place])


class FactorEditor(nn.Module):
    """g: (u, delta) -> (u~, delta~), shared by all edited weights of one shape."""

    def __init__(self, shape: Shape, rank: int, n_layers: int) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        features = sum(shape)
        rank = min(rank, features)
        self.norm_inputs = RunningNorm(self.in_features)
        self.norm_gradients = RunningNorm(self.out_features)
        self.blocks = nn.ModuleList([LowRankBlock(features, rank, n_layers) for _ in range(2)])

    def observe(self, factors: Factors) -> None:
        """Take factors into the input statistics."""
        self.norm_inputs.observe(factors.inputs)
        self.norm_gradients.observe(factors.gradients)

    def forward(self, factors: Factors, place: int) -> Factors:
        z = torch.cat([self.norm_inputs(factors.inputs), self.norm_gradients(factors.gradients)], dim=1)
        for block in self.blocks:
            z = block(z, place)  # tokens x (in + out)
        return Factors(z[:, : self.in_features], z[:, self.in_features :])


class MendEditor(nn.Module):
    """Delta_l = -alpha_l sum_t delta~_t u~_t^T for every edited layer l, with learned edit rates alpha_l.

    Args:
        shapes: layer -> (out, in) of its edited weight; layers of one shape share a network.
        rank: of the networks' low-rank maps.
        edit_lr: alpha_l before training.
    """

    def __init__(self, shapes: Mapping[int, Shape], rank: int, edit_lr: float) -> None:
        super().__init__()
        self.shapes = {int(layer): tuple(shape) for layer, shape in sorted(shapes.items())}
        self.rank = rank
        groups: dict[str, list[int]] = {}
        for layer, shape in self.shapes.items():
            groups.setdefault(_key(shape), []).append(layer)
        self.places = {layer: group.index(layer) for group in groups.values() for layer in group}
        self.networks = nn.ModuleDict(
            {key: FactorEditor(self.shapes[group[0]], rank, len(group)) for key, group in groups.items()}
        )
        self.log_lr = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.tensor(math.log(edit_lr))) for layer in self.shapes}
        )

    def network(self, layer: int) -> FactorEditor:
        """The network that edits a layer's factors."""
        network = self.networks[_key(self.shapes[layer])]
        assert isinstance(network, FactorEditor)
        return network

    def observe(self, factors: Mapping[int, Factors]) -> None:
        """Take a batch's factors into the input statistics (training only)."""
        for layer, found in factors.items():
            self.network(layer).observe(found)

    def forward(self, factors: Mapping[int, Factors]) -> dict[int, Tensor]:
        """layer -> Delta (out x in)."""
        return {layer: self._delta(layer, found) for layer, found in factors.items()}

    def _delta(self, layer: int, factors: Factors) -> Tensor:
        """Delta (out x in) of a layer, which may be on another device than its network."""
        log_lr = self.log_lr[str(layer)]
        here = Factors(factors.inputs.to(log_lr.device), factors.gradients.to(log_lr.device))
        return -log_lr.exp() * self.network(layer)(here, self.places[layer]).weight_gradient()

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the editor to `path` (.safetensors), and what is to be known of it beside it (.json), atomically."""
        settings = {"shapes": {str(k): list(v) for k, v in self.shapes.items()}, "rank": self.rank}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"mend": json.dumps(settings)})
        write_json(path.with_suffix(".json"), {**settings, **about})

    @classmethod
    def load(cls, path: Path) -> MendEditor:
        """Read a saved editor.

        Raises:
            SphereError: the file is damaged or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                settings = json.loads((file.metadata() or {})["mend"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {int(layer): (shape[0], shape[1]) for layer, shape in settings["shapes"].items()}
            editor = cls(shapes, settings["rank"], edit_lr=1.0)
            editor.load_state_dict(tensors)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise SphereError(
                f"{path} is not a trained MEND editor ({first_line(error)}): remove it and train again with "
                "`python -m sphere.baselines.mend.train`."
            ) from error
        return editor


def _key(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
