"""FT: fine-tuning of a few weights on the requests, with or without a bound on the change (Zhu et al. 2020).

`TeacherForcing`, which it trains through, runs prompts with their targets from the lowest edited layer up, on weights
that are handed in; whatever else works with the gradient of the targets' likelihood can use it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.layers import LayerStack, inference
from sphere.forward.padding import pad_right
from sphere.hparams import ModuleHParams, require
from sphere.methods.base import Method, Update, Workspace
from sphere.requests import EditRequest
from sphere.runs.memory import DEVICE, Item, Sizes
from sphere.values.context_templates import padding_id
from sphere.values.tokenization import encode_pair

log = logging.getLogger(__name__)


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

    @classmethod
    def memory(cls, hparams: FTHParams, sizes: Sizes) -> list[Item]:
        size = 5 * sizes.exact_bytes * sizes.entries
        what = "weights before and in training, gradient, Adam"
        return [Item(what, "5 x 4 E", size, DEVICE, "target values", "solve")]

    def __init__(self, workspace: Workspace, hparams: FTHParams) -> None:
        super().__init__(workspace, hparams)
        self.names = [workspace.stack.weight_name(layer) for layer in hparams.layers]

    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        space = self.workspace
        before = {name: space.weights.get(name).clone() for name in self.names}  # out x in each
        with inference(space.model), torch.enable_grad():
            now = self._train(requests, before)
        yield from ((name, now[name] - before[name]) for name in self.names)

    def _train(self, requests: Sequence[EditRequest], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights (out x in) after training."""
        space, h = self.workspace, self.hparams
        chunks = [
            TeacherForcing.of(
                space.stack, space.tokenizer, [(r.text, r.target_new) for r in requests[i : i + h.batch_size]]
            )
            for i in range(0, len(requests), h.batch_size)
        ]
        now = {name: weight.clone().requires_grad_(True) for name, weight in before.items()}
        adam = torch.optim.Adam(now.values(), lr=h.lr, weight_decay=h.weight_decay)
        bar = tqdm(range(h.num_steps), desc=self.name, unit="step", leave=False, disable=not space.progress)
        for _ in bar:
            total = 0.0
            for chunk in chunks:
                stored = {name: space.weights.canonical(name, weight) for name, weight in now.items()}
                losses = chunk.nll(stored)  # rows
                total += float(losses.detach().sum())
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
        return {name: weight.detach() for name, weight in now.items()}

    @torch.no_grad()
    def _constrain(self, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        if (bound := self.hparams.norm_constraint) is not None:
            for name, weight in now.items():
                weight.copy_(torch.clamp(weight, before[name] - bound, before[name] + bound))


class TeacherForcing(nn.Module):
    """Prompts with their targets, run from the lowest edited layer up, as often as wanted, on weights handed in.

    What lies below does not change while only the edited layers do: it is run once, here. Logits are formed only where
    a target's token is predicted. The model's own weights are never written (`torch.func.functional_call`).

    Args:
        rows: (token ids, index of the target's first token) of each row.
        pad: a token id to fill rows with.
    """

    def __init__(self, stack: LayerStack, rows: Sequence[tuple[Sequence[int], int]], pad: int) -> None:
        super().__init__()
        self.model, self.stack = stack.model, stack
        device, width = stack.device, max(len(ids) for ids, _ in rows) - 1
        self.lengths = torch.tensor([len(ids) - 1 for ids, _ in rows], device=device)
        columns = torch.arange(width, device=device)[None]
        self.mask = columns < self.lengths[:, None]  # rows x positions
        self.first = min(stack.hparams.layers)
        inputs = {
            "input_ids": pad_right([ids[:-1] for ids, _ in rows], width, pad, device),
            "attention_mask": self.mask.long(),
            "position_ids": columns.expand(len(rows), -1),
            "use_cache": False,
        }
        with torch.no_grad():
            self.recording = stack.record(inputs, self.first, stack.n_layers - 1)
        scored = [
            (i, p - 1, ids[p], 1 / (len(ids) - s))
            for i, (ids, s) in enumerate(rows)
            for p in range(s, len(ids))
        ]
        self.score_row = torch.tensor([e[0] for e in scored], device=device)
        self.score_position = torch.tensor([e[1] for e in scored], device=device)
        self.labels = torch.tensor([e[2] for e in scored], device=device)
        self.shares = torch.tensor([e[3] for e in scored], device=device)  # 1 / target tokens of the row

    @classmethod
    def of(
        cls, stack: LayerStack, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
    ) -> TeacherForcing:
        """From (prompt, target) texts."""
        rows = [encode_pair(tokenizer, prompt, target) for prompt, target in pairs]
        return cls(stack, rows, padding_id(tokenizer))

    def select(self, rows: Tensor) -> TeacherForcing:
        """The same for some rows, in their order, nothing run again.

        Args:
            rows: (n,) indices.
        """
        chosen = TeacherForcing.__new__(TeacherForcing)
        nn.Module.__init__(chosen)
        chosen.model, chosen.stack, chosen.first = self.model, self.stack, self.first
        rows = rows.to(self.mask.device)
        chosen.recording = self.recording.select(rows)
        chosen.lengths, chosen.mask = self.lengths[rows], self.mask[rows]
        # scored entries, row after chosen row
        new_row, entry = (rows[:, None] == self.score_row[None]).nonzero(as_tuple=True)
        chosen.score_row, chosen.score_position = new_row, self.score_position[entry]
        chosen.labels, chosen.shares = self.labels[entry], self.shares[entry]
        return chosen

    def forward(self) -> Tensor:
        """Logits where a target's token is predicted: (scored x vocabulary), float32."""
        hidden = self.stack.run(self.recording, self.recording.hidden, self.first, self.stack.n_layers - 1)
        row, position = self.score_row.to(hidden.device), self.score_position.to(hidden.device)
        return self.stack.logits(hidden[row, position])

    def logits(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (scored x vocabulary) with some of the model's weights replaced.

        Args:
            weights: parameter name -> tensor in the model's own orientation, of any floating dtype.
        """
        if not weights:
            return self()
        dtype = self.recording.hidden.dtype
        return functional_call(self, {f"model.{name}": w.to(dtype) for name, w in weights.items()}, ())

    def nll(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean negative log-likelihood of each row's target tokens: (rows,)."""
        logits = self.logits(weights)
        nll = F.cross_entropy(logits, self.labels.to(logits.device), reduction="none")  # scored
        shares = (nll * self.shares.to(nll)).to(nll)
        return nll.new_zeros(len(self.lengths)).index_add(0, self.score_row.to(nll.device), shares)
