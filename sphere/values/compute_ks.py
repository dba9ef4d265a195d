"""Keys k and layer outputs at the subject's last token, layer by layer while the layers below are being edited.

The sequences of a batch (every request in every context template, cut after the subject's last token) are laid out as
prefix trees: what several of them begin with, such as a template or a relation's words, is run once. They go through
the layers below the first edited one once; after an update is written they go on from there, so that nothing is
computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.forward.layers import LayerStack
from sphere.forward.packing import (
    ROW_TOKENS,
    PackedRow,
    Scored,
    batches,
    model_inputs,
    one_per_row,
    pack_trees,
)
from sphere.forward.remaining import Lookups, RemainingPart
from sphere.requests import EditRequest
from sphere.values.context_templates import BARE, fill
from sphere.values.tokenization import bos_text, encode, subject_token

Ids = tuple[int, ...]


def ids_to_subject(tokenizer: PreTrainedTokenizerBase, template: str, request: EditRequest) -> Ids:
    """Token ids of a request in a template up to the subject's last token."""
    filled = fill(template, request, bos_text(tokenizer))
    encoded = encode(tokenizer, filled.text)
    lookup = subject_token(encoded, filled.subject_end, f"case {request.case_id}")
    return tuple(encoded.ids[: lookup + 1])


class _TreeBatch:
    """Rows of prefix trees that are run together, and how far up they have got.

    Attributes:
        sequences: their token ids, in the order of `at_ends`.
        hidden: (rows x columns x d), entering layer `at`.
    """

    def __init__(
        self, stack: LayerStack, rows: Sequence[PackedRow], trees: bool, first: int, last: int
    ) -> None:
        self.recorded = stack.record(model_inputs(stack.model, rows, trees), first, last)
        self.restart()
        ends = [(row, scored.ids, path[-1]) for row, r in enumerate(rows) for scored, path in r.paths]
        self.sequences: list[Ids] = [ids for _, ids, _ in ends]
        self._rows = torch.tensor([row for row, _, _ in ends])  # (sequences,)
        self._columns = torch.tensor([column for _, _, column in ends])  # (sequences,) node of the last token

    def restart(self) -> None:
        """Back to the entry of the first layer."""
        self.hidden, self.at = self.recorded.hidden, self.recorded.first

    def advance(self, stack: LayerStack, layer: int) -> None:
        """Up to the entry of `layer`."""
        self.hidden = stack.run(self.recorded, self.hidden, self.at, layer - 1)
        self.at = layer

    def ends(self) -> Lookups:
        """Each sequence's last token, at the layer reached."""
        return Lookups(self.recorded, self.hidden, self._rows, self._columns)

    def at_ends(self, x: Tensor) -> Tensor:
        """(rows x columns x d) -> (sequences x d) at each sequence's last token, float32 or wider."""
        chosen = x[self._rows.to(x.device), self._columns.to(x.device)]
        return chosen.to(torch.promote_types(x.dtype, torch.float32))


class ActivationsPass:
    """Keys and outputs of a batch of requests, asked for in increasing order of layers.

    Args:
        templates: groups of context templates; a key is averaged within each group, then over groups.
        batch_tokens: how many (padded) tokens one forward pass may hold.
        bare: the template without a context: "{}", or the user's turn of a chat template.

    Attributes:
        bare_ids: the longest bare prompt up to its subject's last token.
        bare_index: (n,) each request's bare prompt among the distinct ones, which are S.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        templates: Sequence[Sequence[str]],
        batch_tokens: int,
        bare: str = BARE,
    ) -> None:
        self.stack, self.n = stack, len(requests)
        first, last = min(stack.hparams.layers), max(stack.hparams.layers)
        weights: dict[Ids, dict[int, float]] = {}  # sequence -> request -> its weight in the request's mean
        for index, request in enumerate(requests):
            for group in templates:
                for template in group:
                    of_request = weights.setdefault(ids_to_subject(tokenizer, template, request), {})
                    of_request[index] = of_request.get(index, 0.0) + 1 / (len(templates) * len(group))
        alone = [ids_to_subject(tokenizer, bare, request) for request in requests]
        self.bare_ids = max(alone, key=len)
        trees = stack.takes_trees(max(weights, key=len))
        others = weights.keys() - set(alone)
        with torch.no_grad():
            self._bare = _tree_batches(stack, alone, trees, first, last, batch_tokens)
            self._other = _tree_batches(stack, list(others), trees, first, last, batch_tokens)
        index_of = {ids: i for i, ids in enumerate(ids for part in self._bare for ids in part.sequences)}
        self.bare_index = torch.tensor([index_of[ids] for ids in alone])  # (n,) a request's bare prompt
        self._means = [self._mean(part, weights) for part in self._bare + self._other]

    def _mean(self, part: _TreeBatch, weights: dict[Ids, dict[int, float]]) -> Tensor:
        """(n x sequences): the weight of each sequence's key in the mean of each request."""
        result = torch.zeros(self.n, len(part.sequences))
        for column, ids in enumerate(part.sequences):
            for request, weight in weights.get(ids, {}).items():
                result[request, column] = weight
        return result

    def restart(self) -> ActivationsPass:
        """The same pass from the first edited layer on: what is below it is not edited, and not run again."""
        for part in self._bare + self._other:
            part.restart()
        return self

    @torch.no_grad()
    def compute_ks(self, layer: int) -> Tensor:
        """Mean input of the layer's edited module at the subject's last token: K (in x n), float32 or wider."""
        total: Tensor | None = None
        for part, mean in zip(self._bare + self._other, self._means, strict=True):
            part.advance(self.stack, layer)
            inputs = part.at_ends(
                self.stack.module_input(part.recorded, part.hidden, layer)
            )  # sequences x in
            keys = mean.to(inputs) @ inputs  # n x in
            total = keys if total is None else total + keys.to(total.device)
        assert total is not None
        return total.T

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Bring the bare prompts up to the entry of `layer`, on the weights as they stand."""
        for part in self._bare:
            part.advance(self.stack, layer)

    @torch.no_grad()
    def remaining_parts(self, layers: Sequence[int]) -> list[RemainingPart]:
        """From the edited module's output to the layer's, of each layer, at the last tokens of the S bare prompts.

        The pass is brought up to the first of the layers.
        """
        self.advance(layers[0])
        lookups: dict[int, list[Lookups]] = {layer: [] for layer in layers}
        for part in self._bare:
            ends = part.ends()
            for layer, next_layer in zip(layers, [*layers[1:], None], strict=True):
                lookups[layer].append(ends)
                if next_layer is not None:
                    hidden = self.stack.run(ends.recorded, ends.hidden, layer, next_layer - 1)
                    ends = replace(ends, hidden=hidden)
        return [RemainingPart(self.stack, layer, its) for layer, its in lookups.items()]

    @torch.no_grad()
    def outputs(self, layer: int) -> Tensor:
        """Output of decoder layer `layer` for the bare prompts, from the hidden states reached: (out x n)."""
        parts = [
            part.at_ends(self.stack.run(part.recorded, part.hidden, part.at, layer)) for part in self._bare
        ]
        return torch.cat(parts)[self.bare_index.to(parts[0].device)].T


def _tree_batches(
    stack: LayerStack, ids: Sequence[Ids], trees: bool, first: int, last: int, batch_tokens: int
) -> list[_TreeBatch]:
    """Sequences as prefix trees where the model takes them, else each in its own row; so many tokens at a time."""
    sequences = [Scored(x, len(x)) for x in ids]
    rows = pack_trees(sequences, min(ROW_TOKENS, batch_tokens)) if trees else one_per_row(sequences)
    return [_TreeBatch(stack, batch, trees, first, last) for batch in batches(rows, batch_tokens)]
