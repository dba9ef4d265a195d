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
PROBE_TOKENS = 6  # of the shortest sequence that shows whether tree masks are heeded


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
        if self.trees is None:
            self.trees = self.takes_trees(sequences)
        rows = (
            pack_trees(sequences, min(ROW_TOKENS, self.batch_tokens))
            if self.trees
            else one_per_row(sequences)
        )
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        results: dict[Scored, TokenScores] = {}
        for batch in batches(rows, self.batch_tokens, max(1, LOGIT_VALUES // vocabulary)):
            found = self._forward(batch, self.trees)
            results |= found
            if progress is not None:
                progress.update(len(found))
        return results

    def _check_lengths(self, sequences: Sequence[Scored]) -> None:
        longest = max((len(scored.ids) for scored in sequences), default=0)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and longest > positions:
            raise SphereError(
                f"A prompt has {longest} tokens with its target, the model only {positions} positions: "
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
        """Score a forked tree and a second one beside it both ways: are tree masks and positions heeded?"""
        ids = min((scored.ids for scored in sequences), key=len)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # Long enough to fork: different tokens behind what is shorter.
        ids += tuple(vocabulary * i // PROBE_TOKENS for i in range(1, PROBE_TOKENS - len(ids) + 1))
        half, turned = len(ids) // 2, ids[::-1]
        few = [Scored(path, 1) for path in (ids, ids[:half] + turned[: len(ids) - half], turned)]
        plain = self._forward(one_per_row(few), trees=False)
        try:
            packed = self._forward(
                pack_trees(few, row_tokens=sum(len(scored.ids) for scored in few)), trees=True
            )
        except Exception as error:  # a model may refuse such a mask in any way it likes
            log.info("%s does not take tree masks (%s)", type(self.model).__name__, error)
            return False
        difference = max(float(np.abs(packed[key].nll - plain[key].nll).max()) for key in few)
        tolerance = 1e-3 if torch.finfo(self.model.dtype).bits >= 32 else 0.2
        if not difference < tolerance:
            log.info("%s does not heed tree masks: every prompt is run by itself", type(self.model).__name__)
        return difference < tolerance


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
