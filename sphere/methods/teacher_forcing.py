"""Prompts with their targets, run from the lowest edited layer up on weights that are handed in.

For whatever works with the gradient of the targets' likelihood (FT, MEND). Knows layers and tokens; knows nothing of
how weights are changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase

from sphere.forward.layers import LayerStack
from sphere.forward.padding import pad_right
from sphere.values.joiner import Continued
from sphere.values.tokenization import encode_pair, padding_id


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
        self.token_weights = torch.tensor(
            [e[3] for e in scored], device=device
        )  # 1 / target tokens of the row

    @classmethod
    def of(
        cls, stack: LayerStack, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Continued]
    ) -> TeacherForcing:
        """From prompts and what follows them."""
        rows = [encode_pair(tokenizer, *pair) for pair in pairs]
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
        chosen.labels, chosen.token_weights = self.labels[entry], self.token_weights[entry]
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
        weighted = nll * self.token_weights.to(nll)
        return nll.new_zeros(len(self.lengths)).index_add(0, self.score_row.to(nll.device), weighted)
