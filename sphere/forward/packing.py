"""Scoring many token sequences with few forward passes: shared prefixes are computed once, rows hardly padded.

Sequences are sorted and laid out as prefix trees, several trees in one row. A token attends to its ancestors only
and its position is its depth, so each path through a tree is scored as if it stood alone. Where a model cannot take
such masks (recurrent models, ALiBi), which a probe finds out, each sequence gets a right-padded row of its
own. Logits are computed at the scored positions only, by the model's own forward, so that scaled or capped logits
stay right.

Knows token ids and models. Knows nothing of tokenizers, prompts or metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SLIDING = "sliding_attention"  # what transformers calls the type of a layer with a window
ROW_TOKENS = 256  # long enough to waste little, short enough that attention stays cheap beside the MLPs


class Scored(NamedTuple):
    """A sequence of token ids of which `ids[start:]` is to be scored; `start` is at least 1."""

    ids: tuple[int, ...]
    start: int


class TokenScores(NamedTuple):
    """For each scored token: its negative log-likelihood (nats), and the argmax of the model in its place."""

    nll: np.ndarray  # (T,) float64
    predicted: np.ndarray  # (T,) int64

    def hits(self, scored: Scored) -> list[bool]:
        """For each scored token: is it the argmax?"""
        return (self.predicted == np.array(scored.ids[scored.start :])).tolist()


@dataclass
class PackedRow:
    """Token ids as nodes of prefix trees: `parents[i]` < i is the node before node i, -1 at a root."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[tuple[Scored, list[int]]] = field(default_factory=list)  # nodes of each sequence, root first

    def shared(self, ids: Sequence[int]) -> list[int]:
        """The nodes of the latest sequence that begin `ids` too."""
        if not self.paths:
            return []
        latest, path = self.paths[-1]
        common = 0
        while common < min(len(latest.ids), len(ids)) and latest.ids[common] == ids[common]:
            common += 1
        return path[:common]

    def add(self, scored: Scored, shared: list[int]) -> None:
        """Append the nodes of a sequence after those that it shares."""
        path = list(shared)
        for token in scored.ids[len(shared) :]:
            self.tokens.append(token)
            self.parents.append(path[-1] if path else -1)
            self.depths.append(len(path))
            path.append(len(self.tokens) - 1)
        self.paths.append((scored, path))

    def attention(self, length: int) -> np.ndarray:
        """(length, length) bool: node i sees node j if j is i or an ancestor of i. Padding sees itself."""
        sees = np.eye(length, dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees

    @property
    def scored_nodes(self) -> set[int]:
        """Nodes whose next-token distribution is asked for."""
        return {node for scored, path in self.paths for node in path[scored.start - 1 : -1]}


def pack_trees(sequences: Sequence[Scored], row_tokens: int = ROW_TOKENS) -> list[PackedRow]:
    """Lay sequences out as prefix trees, each row filled up to `row_tokens` (more only for a longer sequence)."""
    rows: list[PackedRow] = []
    for scored in sorted(set(sequences)):  # neighbors in this order share the longest prefixes
        shared = rows[-1].shared(scored.ids) if rows else []
        if not rows or len(rows[-1].tokens) + len(scored.ids) - len(shared) > row_tokens:
            rows.append(PackedRow())
            shared = []
        rows[-1].add(scored, shared)
    return rows


def one_per_row(sequences: Sequence[Scored]) -> list[PackedRow]:
    """Each sequence in its own row, by length."""
    rows = []
    for scored in sorted(set(sequences), key=lambda s: (len(s.ids), s)):
        rows.append(PackedRow())
        rows[-1].add(scored, [])
    return rows


def batches(
    rows: Sequence[PackedRow], batch_tokens: int, batch_scored: float = math.inf
) -> Iterator[list[PackedRow]]:
    """Neighboring rows together, up to so many tokens with padding and so many scored positions."""
    batch: list[PackedRow] = []
    longest = scored = 0
    for row in rows:
        length, n_scored = len(row.tokens), len(row.scored_nodes)
        grown = max(longest, length)
        if batch and (grown * (len(batch) + 1) > batch_tokens or scored + n_scored > batch_scored):
            yield batch
            batch, grown, scored = [], length, 0
        batch.append(row)
        longest, scored = grown, scored + n_scored
    if batch:
        yield batch


def model_inputs(model: Any, batch: Sequence[PackedRow], trees: bool) -> dict[str, Any]:
    """Arguments of the model for rows (right-padded): as prefix trees, or as one sequence per row."""
    device, length = model.get_input_embeddings().weight.device, max(len(row.tokens) for row in batch)
    ids = np.zeros((len(batch), length), dtype=np.int64)  # any id will do as padding: nothing sees it
    for b, row in enumerate(batch):
        ids[b, : len(row.tokens)] = row.tokens
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    if not trees:
        lengths = np.array([len(row.tokens) for row in batch])
        present = (np.arange(length) < lengths[:, None]).astype(np.int64)
        return inputs | {"attention_mask": torch.from_numpy(present).to(device)}
    sees = torch.from_numpy(np.stack([row.attention(length) for row in batch])).to(device)
    depths = np.zeros((len(batch), length), dtype=np.int64)
    for b, row in enumerate(batch):
        depths[b, : len(row.depths)] = row.depths
    positions = torch.from_numpy(depths).to(device)
    masks = attention_masks(model, sees, positions, positions, longest=int(depths.max()) + 1)
    return inputs | {"attention_mask": masks, "position_ids": positions}


def attention_masks(
    model: Any, sees: Tensor, query_positions: Tensor, key_positions: Tensor, *, longest: int
) -> Tensor | dict[str, Tensor]:
    """Who sees whom as the model takes it: one mask for all layers, or one for each type of layer.

    In a layer with a sliding window a token sees the last tokens of its own sequence only. How far it sees is measured
    in positions, since what lies between two tokens of a packed row need not be theirs.

    Args:
        sees: (B, Q, K) bool, windows aside.
        query_positions, key_positions: (B, Q) and (B, K), each in its own sequence.
        longest: tokens of the longest sequence; no window is felt in it that is not shorter.

    Returns:
        (B, 1, Q, K), or type of layer -> (B, 1, Q, K): 0 where seen and the lowest number elsewhere.
    """
    dtype = model.get_input_embeddings().weight.dtype
    everything = _additive_mask(sees, dtype)
    config = model.config.get_text_config(decoder=True)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or longest <= window or (types and SLIDING not in types):
        return everything
    distance = query_positions[:, :, None] - key_positions[:, None]  # B, Q, K
    near = _additive_mask(sees & (distance < window), dtype)
    return {kind: near if kind == SLIDING else everything for kind in set(types)} if types else near


def _additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Q, K) bool -> (B, 1, Q, K): 0 where seen and the lowest number elsewhere."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]
