"""FT: fine-tuning of a few weights on the requests, with or without a bound on the change (Zhu et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sphere.errors import SphereError
from sphere.forward.modules import inference
from sphere.hparams import ModuleHParams, require
from sphere.methods.base import Method, Update
from sphere.methods.teacher_forcing import TeacherForcing
from sphere.requests import EditRequest
from sphere.values.joiner import Continued


@dataclass(frozen=True, kw_only=True)
class FTHParams(ModuleHParams):
    """FT's keys.

    Attributes:
        num_steps: passes over the requests of a batch.
        lr: Adam's learning rate.
        weight_decay: Adam's (L2, of the weights).
        norm_constraint: bound on every entry's change within a batch (infinity norm); null for none.
        batch_size: requests per step.
        loss_tolerance: training ends when the mean loss of a pass is below it.
    """

    num_steps: int
    lr: float
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    batch_size: int = 32
    loss_tolerance: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("num_steps", "lr", "batch_size"), not_negative=("weight_decay",))
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise SphereError(f"norm_constraint must be positive or null, got {self.norm_constraint}.")


class FT(Method):
    """Adam on the negative log-likelihood of the target's tokens, each at its own position (teacher forcing).

    After every step the weights are brought back to |W - W_before|_inf <= `norm_constraint`, where that is given
    (FT-L of the ROME paper, appendix E.1). Delta = W - W_before; the model itself is not touched.
    """

    name = "FT"
    reference = (
        "Modifying Memories in Transformer Models, arXiv 2012.00363; as a baseline in ROME, arXiv 2202.05262"
    )
    hparams_class = FTHParams
    uses_subject = False

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        weights = self.edited.weights
        before = {name: weights.get(name).clone() for name in weights.names}  # out x in each
        with inference(self.edited.model), torch.enable_grad():
            now = self._train(requests, before)
        yield from ((name, now[name] - before[name]) for name in weights.names)

    def _train(self, requests: Sequence[EditRequest], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights (out x in) after training."""
        edited, h = self.edited, self.hparams
        pairs = [Continued(edited.asked(r.text), r.target_new, r.joiner) for r in requests]
        chunks = [
            TeacherForcing.of(edited.stack, edited.tokenizer, pairs[i : i + h.batch_size])
            for i in range(0, len(requests), h.batch_size)
        ]
        now = {name: weight.clone().requires_grad_(True) for name, weight in before.items()}
        adam = torch.optim.Adam(now.values(), lr=h.lr, weight_decay=h.weight_decay)
        bar = tqdm(
            range(h.num_steps), desc=self.name, unit="step", leave=False, disable=not self.services.progress
        )
        for _ in bar:
            total, noted = 0.0, list[float]()
            for chunk in chunks:
                stored = {name: edited.weights.canonical(name, weight) for name, weight in now.items()}
                losses = chunk.nll(stored)  # rows
                total += float(losses.detach().sum())
                noted += losses.detach().tolist()
                if losses.detach().mean() < h.loss_tolerance:
                    continue
                adam.zero_grad()
                losses.mean().backward()
                adam.step()
                self._constrain(now, before)
            mean = total / len(requests)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if not mean >= h.loss_tolerance:
                break
        bar.close()
        self.services.losses |= zip((r.case_id for r in requests), noted, strict=True)
        return {name: weight.detach() for name, weight in now.items()}

    @torch.no_grad()
    def _constrain(self, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        if (bound := self.hparams.norm_constraint) is not None:
            for name, weight in now.items():
                weight.copy_(torch.clamp(weight, before[name] - bound, before[name] + bound))
