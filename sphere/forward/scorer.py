"""Teacher-forced scores of token sequences: packed as prefix trees, logits at the scored positions only.

Logits come from the model's own forward, so that scaled or capped logits stay right. Knows token ids and models. Knows
nothing of tokenizers, prompts or metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sphere.errors import SphereError
from sphere.forward.packing import (
    ROW_TOKENS,
    PackedRow,
    Scored,
    TokenScores,
    batches,
    model_inputs,
    one_per_row,
    pack_trees,
)
from sphere.forward.passes import PassOptions

log = logging.getLogger(__name__)

LOGIT_VALUES = 1 << 27  # logits held at once: 512 MiB in float32
PROBE_TOKENS = 8  # of the shortest sequence that shows whether tree masks are heeded
PROBE_ROW = 2.5  # length of the probe's row, as a multiple of its sequences': two of them and half of a third


class PackedScorer:
    """Teacher-forced scores of token sequences under one model.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        passes: how forward passes are cut.
    """

    def __init__(self, model: Any, passes: PassOptions | None = None) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.batch_tokens = (passes or PassOptions()).scoring_tokens(self.device)
        self.trees: bool | None = None  # whether the model takes tree masks; asked at the first call
        self._probed = 0  # tokens of the longest sequence that it was asked with
        self._positions: int | None = getattr(model.config, "max_position_embeddings", None)

    def score(self, sequences: Sequence[Scored], progress: tqdm | None = None) -> dict[Scored, TokenScores]:
        """Score every distinct sequence.

        Args:
            progress: a bar that is moved by the number of sequences done.

        Raises:
            SphereError: a sequence is longer than the model's positions.
        """
        self._check_lengths(sequences)
        if not sequences:
            return {}
        trees = self.takes_trees(sequences)
        rows = pack_trees(sequences, min(ROW_TOKENS, self.batch_tokens)) if trees else one_per_row(sequences)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        results: dict[Scored, TokenScores] = {}
        for batch in batches(rows, self.batch_tokens, max(1, LOGIT_VALUES // vocabulary)):
            found = self._forward(batch, trees)
            results |= found
            if progress is not None:
                progress.update(len(found))
        return results

    def _check_lengths(self, sequences: Sequence[Scored]) -> None:
        longest = max((len(scored.ids) for scored in sequences), default=0)
        if self._positions and longest > self._positions:
            raise SphereError(
                f"A prompt has {longest} tokens with its target, the model only {self._positions} positions: "
                "shorten or remove the record."
            )

    @torch.no_grad()
    def _forward(self, batch: Sequence[PackedRow], trees: bool) -> dict[Scored, TokenScores]:
        nodes = [(b, node) for b, row in enumerate(batch) for node in sorted(row.scored_nodes)]
        with _logits_at(self.model, nodes) as select:
            output = self.model(**model_inputs(self.model, batch, trees))
            logits = select(output.logits)  # (N, vocabulary)
        index = {node: n for n, node in enumerate(nodes)}
        asked = [
            (index[b, path[i - 1]], scored.ids[i])
            for b, row in enumerate(batch)
            for scored, path in row.paths
            for i in range(scored.start, len(path))
        ]
        where = torch.tensor([n for n, _ in asked], device=logits.device)
        tokens = torch.tensor([token for _, token in asked], device=logits.device)
        normaliser = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(256)])  # (N,)
        nll = (normaliser[where] - logits[where, tokens].float()).double().cpu().numpy()
        broken = ~normaliser.isfinite()  # a model that an edit destroyed predicts nothing
        predicted = logits.argmax(-1).masked_fill(broken, -1)[where].cpu().numpy()
        return _by_sequence(batch, nll, predicted)

    def takes_trees(self, sequences: Sequence[Scored]) -> bool:
        """Whether the model heeds tree masks and positions in sequences as long as these.

        Asked of the model by a probe, and again, with longer ones, when sequences grow: beyond a window that the model
        has in a way of its own, what held before may no longer hold. A probe's row is no longer than a pass may be:
        the trees of what is longer than its sequences share no wider rows.
        """
        most = max(int(self.batch_tokens / PROBE_ROW), PROBE_TOKENS)
        longest = max((scored.ids for scored in sequences), key=len)[:most]
        if self.trees is not False and len(longest) > self._probed:
            rounded = min(max(_next_power(len(longest)), PROBE_TOKENS), most)
            self._probed = max(len(longest), min(rounded, self._positions or rounded))
            self.trees = self._heeds_trees(longest, self._probed)
        return bool(self.trees)

    def _heeds_trees(self, ids: tuple[int, ...], length: int) -> bool:
        """Score a forked tree and a second one beside it, in a row as wide as rows are, both ways."""
        width = min(ROW_TOKENS, self.batch_tokens)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # Long enough to fork: different tokens behind what is shorter.
        ids += tuple(vocabulary * i // length for i in range(1, length - len(ids) + 1))
        half, turned = length // 2, ids[::-1]
        first, fork, beside = (
            Scored(path, 1) for path in (ids, ids[:half] + turned[: length - half], turned)
        )
        row = PackedRow()
        row.add(first, [])
        root = row.paths[0][1][:half]
        full = min(width - length, self.batch_tokens - (2 * length - half) + 1)
        while len(row.tokens) < full or len(row.paths) == 1:
            row.add(beside, [])
        row.add(fork, root)
        plain: dict[Scored, TokenScores] = {}
        for scored in (first, fork, beside):  # one in a pass: no larger ones than needed
            plain |= self._forward(one_per_row([scored]), trees=False)
        try:
            packed = self._forward([row], trees=True)
        except Exception as error:  # a model may refuse such a mask in any way it likes
            log.info("%s does not take tree masks (%s)", type(self.model).__name__, error)
            return False
        difference = max(float(np.abs(packed[key].nll - plain[key].nll).max()) for key in plain)
        largest = max(
            float(plain[key].nll.max()) for key in plain
        )  # nats; thousands once edits destroyed a model
        tolerance = (1e-3 if torch.finfo(self.model.dtype).bits >= 32 else 0.2) * max(1.0, largest / 100)
        if not difference < tolerance:
            log.info("%s does not heed tree masks: every prompt is run by itself", type(self.model).__name__)
        return difference < tolerance


def _next_power(length: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (length - 1).bit_length()


def _by_sequence(
    batch: Sequence[PackedRow], nll: np.ndarray, predicted: np.ndarray
) -> dict[Scored, TokenScores]:
    """Cut the flat results of a batch into those of its sequences."""
    results, start = {}, 0
    for row in batch:
        for scored, path in row.paths:
            end = start + len(path) - scored.start
            results[scored] = TokenScores(nll[start:end], predicted[start:end])
            start = end
    return results


@contextmanager
def _logits_at(model: Any, nodes: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """Within the block the model computes logits at `nodes` (row, position) only.

    Its output embedding is handed the hidden states of these positions, as one row. Yields the function that
    turns the output's logits into (N, vocabulary).
    """
    rows, columns = torch.tensor(nodes).T

    def at_nodes(values: Tensor) -> Tensor:  # (B, L, d) -> (N, d)
        return values[rows.to(values.device), columns.to(values.device)]

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        yield at_nodes
        return

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (at_nodes(args[0])[None], *args[1:])

    handle = head.register_forward_pre_hook(before)
    try:
        yield lambda logits: logits[0]
    finally:
        handle.remove()
