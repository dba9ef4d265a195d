"""Keys k and layer outputs at the subject's last token, layer by layer while the layers below are being edited.

The rows of a batch (every request in every context template, cut after the subject's last token) are run up to the
first edited layer once; after an update is written they go on from there, so that nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.layers import LayerStack, Recording, packs, pad_left
from sphere.requests import EditRequest
from sphere.templates import fill, padding_id
from sphere.tokenization import encode, subject_token


def truncated_row(tokenizer: PreTrainedTokenizerBase, template: str, request: EditRequest) -> tuple[int, ...]:
    """Token ids of a request in a template up to the subject's last token."""
    filled = fill(template, request)
    encoded = encode(tokenizer, filled.text)
    lookup = subject_token(tokenizer, encoded, filled.subject_end, f"case {request.case_id}")
    return tuple(encoded.ids[: lookup + 1])


class _Pack:
    """Rows of similar length and how far up they have got."""

    def __init__(self, stack: LayerStack, rows: Sequence[tuple[int, ...]], pad: int, first: int, last: int):
        width = max(len(r) for r in rows)
        ids = pad_left(rows, width, pad, stack.device)  # lookup position = last column
        starts = torch.tensor([width - len(r) for r in rows], device=stack.device)[:, None]
        columns = torch.arange(width, device=stack.device)[None]
        inputs = {
            "input_ids": ids,
            "attention_mask": (columns >= starts).long(),
            "position_ids": (columns - starts).clamp(min=0),
            "use_cache": False,
        }
        self.recording: Recording = stack.record(inputs, first, last)
        self.hidden = self.recording.hidden  # (rows x width x d), entering layer `at`
        self.at = first

    def advance(self, stack: LayerStack, layer: int) -> None:
        self.hidden = stack.run(self.recording, self.hidden, self.at, layer - 1)
        self.at = layer


class KeyWalk:
    """Keys and outputs of a batch of requests, asked for in increasing order of layers.

    Args:
        templates: groups of context templates; a key is averaged within each group, then over groups.
        batch_tokens: how many (padded) tokens one forward pass may hold.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        templates: Sequence[Sequence[str]],
        batch_tokens: int,
    ) -> None:
        self.stack, self.n = stack, len(requests)
        first, last = min(stack.hparams.layers), max(stack.hparams.layers)
        share: dict[tuple[int, ...], dict[int, float]] = {}  # row -> its weight in each request's mean
        for index, request in enumerate(requests):
            for group in templates:
                for template in group:
                    row = share.setdefault(truncated_row(tokenizer, template, request), {})
                    row[index] = row.get(index, 0.0) + 1 / (len(templates) * len(group))
        bare = [truncated_row(tokenizer, "{}", request) for request in requests]
        bare_rows = list(dict.fromkeys(bare))
        other_rows = [row for row in share if row not in set(bare_rows)]
        pad = padding_id(tokenizer)
        self._share = share
        with torch.no_grad():
            self._bare = _build(stack, bare_rows, pad, first, last, batch_tokens)
            self._other = _build(stack, other_rows, pad, first, last, batch_tokens)
        place = {row: i for i, row in enumerate(row for rows, _ in self._bare for row in rows)}
        self._bare_place = torch.tensor([place[row] for row in bare])  # request -> its bare row

    @torch.no_grad()
    def keys(self, layer: int) -> Tensor:
        """Mean input of the layer's edited module at the subject's last token: K (in x n), float32 or wider."""
        total: Tensor | None = None
        for rows, pack in self._bare + self._other:
            pack.advance(self.stack, layer)
            inputs = self.stack.module_input(pack.recording, pack.hidden, layer)[:, -1]  # rows x in
            inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
            weights = inputs.new_zeros(self.n, len(rows))
            for column, row in enumerate(rows):
                for request, value in self._share.get(row, {}).items():
                    weights[request, column] = value
            part = weights @ inputs  # n x in
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total.T

    @torch.no_grad()
    def outputs(self, layer: int) -> Tensor:
        """Output of decoder layer `layer` for the bare prompts, from the hidden states reached: (out x n)."""
        parts = []
        for _, pack in self._bare:
            hidden = self.stack.run(pack.recording, pack.hidden, pack.at, layer)[:, -1]
            parts.append(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
        return torch.cat(parts)[self._bare_place.to(parts[0].device)].T


def _build(
    stack: LayerStack, rows: list[tuple[int, ...]], pad: int, first: int, last: int, batch_tokens: int
) -> list[tuple[list[tuple[int, ...]], _Pack]]:
    result = []
    for group in packs([len(r) for r in rows], batch_tokens):
        chosen = [rows[i] for i in group]
        result.append((chosen, _Pack(stack, chosen, pad, first, last)))
    return result
