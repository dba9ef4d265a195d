"""Attention keys and values of constant prefixes: each distinct token is run once, whoever shares it.

    slot      0    1    2    3    4    5    6      one (heads x head_dim) key and value per layer
    token     The  sun  is   up   .    Ann  Bob
    prefixes  [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]: those of a group share the slots of what all begin with

Knows token ids and a `LayerStack`. Knows nothing of requests, templates or what comes behind a prefix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sphere.forward.layers import LayerStack
from sphere.forward.packing import attention_masks
from sphere.forward.padding import group_by_length, pad_left, pad_right
from sphere.forward.prefix_cache import FrozenPrefixCache

Slots = list[int]
NOBODY = -1  # owner of padding


class Segment(NamedTuple):
    """Token ids behind a stored prefix."""

    behind: Slots
    ids: Sequence[int]


class PrefixStore:
    """Keys and values by token and layer; a prefix is the list of its tokens' slots in the store.

    Args:
        pad: token id to fill rows with.
        batch_tokens: how many (padded) tokens one forward pass may compute.
    """

    def __init__(self, stack: LayerStack, pad: int, batch_tokens: int) -> None:
        self.stack, self.pad, self.batch_tokens = stack, pad, batch_tokens
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys, values: (slots x heads x head_dim) each
        self._size = 0

    def add(self, prefixes: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> list[Slots]:
        """Run prefixes (of token ids); what all of a group begin with is run once for the group.

        Returns:
            the slots of each prefix.
        """
        members: dict[Hashable, list[list[int]]] = {}
        for prefix, group in zip(prefixes, groups, strict=True):
            members.setdefault(group, []).append(list(prefix))
        roots = {group: _common(m) for group, m in members.items()}
        at_root = dict(zip(roots, self._extend([[]] * len(roots), list(roots.values())), strict=True))
        rest = {
            (group, *prefix): (at_root[group], list(prefix[len(roots[group]) :]))
            for prefix, group in zip(prefixes, groups, strict=True)
        }
        own = self._extend([root for root, _ in rest.values()], [ids for _, ids in rest.values()])
        slots = {key: root + mine for (key, (root, _)), mine in zip(rest.items(), own, strict=True)}
        return [slots[group, *prefix] for prefix, group in zip(prefixes, groups, strict=True)]

    def inputs(self, rows: Sequence[Sequence[Segment]]) -> dict[str, Any]:
        """Arguments of the model for packed rows of segments, prefixes left-padded, token ids right-padded.

        Segments that share a row do not see each other, which takes a model that heeds such masks
        (`LayerStack.takes_trees`); for rows of one segment any model will do.
        """
        device = self.stack.device
        prefixes = [[slot for segment in row for slot in segment.behind] for row in rows]
        ids = [[token for segment in row for token in segment.ids] for row in rows]
        positions = [[len(s.behind) + i for s in row for i in range(len(s.ids))] for row in rows]
        before, after = max(map(len, prefixes)), max(map(len, ids))
        position_ids = pad_right(positions, after, 0, device)  # rows x after
        inputs: dict[str, Any] = {
            "input_ids": pad_right(ids, after, self.pad, device),  # rows x after
            "attention_mask": self._masks(rows, before, position_ids),
            "position_ids": position_ids,
            "use_cache": before > 0,
        }
        if before:
            inputs[self.stack.cache_argument] = self._cache(prefixes, before)
        return inputs

    def _masks(
        self, rows: Sequence[Sequence[Segment]], before: int, positions: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """(rows x (before + after)) of present tokens; of segments in common rows, what each token sees.

        Args:
            positions: (rows x after) of the token ids, each in its own sequence.
        """
        device, after = self.stack.device, positions.shape[1]
        behind = [[n for n, s in enumerate(row) for _ in s.behind] for row in rows]
        own = [[n for n, s in enumerate(row) for _ in s.ids] for row in rows]
        queries = pad_right(own, after, NOBODY, device)  # rows x after: number of each token's segment
        keys = torch.cat([pad_left(behind, before, NOBODY - 1, device), queries], dim=1)
        if max(map(len, rows)) == 1:
            return (keys >= 0).long()
        sees = rearrange(queries, "row query -> row query 1") == rearrange(keys, "row key -> row 1 key")
        sees[:, :, before:] &= torch.ones(after, after, dtype=torch.bool, device=device).tril()
        in_prefix = [[i for s in row for i in range(len(s.behind))] for row in rows]
        key_positions = torch.cat([pad_left(in_prefix, before, 0, device), positions], dim=1)
        longest = max(len(s.behind) + len(s.ids) for row in rows for s in row)
        return attention_masks(self.stack.model, sees, positions, key_positions, longest=longest)

    def _cache(self, prefixes: Sequence[Slots], width: int) -> FrozenPrefixCache:
        """The keys and values of stored prefixes, left-padded to `width`."""
        slots = pad_left(prefixes, width, 0, self.stack.device)  # rows x width
        cache = FrozenPrefixCache()
        for layer, stored in enumerate(self._layers):
            at = slots.to(stored[0].device)
            keys, values = (
                rearrange(part[at], "row width heads head_dim -> row heads width head_dim").contiguous()
                for part in stored
            )
            cache.update(keys, values, layer)
        return cache.freeze()

    @torch.no_grad()
    def _extend(self, prefixes: Sequence[Slots], ids: Sequence[Sequence[int]]) -> list[Slots]:
        """Run token ids behind stored prefixes and store them, too: the slots of the ids."""
        slots: list[Slots] = [[] for _ in ids]
        parts = [[pair] for pair in self._layers]
        filled = [i for i, row in enumerate(ids) if row]
        for group in group_by_length(
            [len(ids[i]) for i in filled], self.batch_tokens, self.stack.pass_overhead
        ):
            chosen = [filled[i] for i in group]
            inputs = self.inputs([[Segment(prefixes[i], ids[i])] for i in chosen])
            own = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].bool()  # rows x after
            for layer, (keys, values) in enumerate(self.stack.fill_cache(inputs).keys_and_values()):
                mask = own.to(keys.device)
                new = tuple(
                    rearrange(
                        x[:, :, -mask.shape[1] :], "row heads after head_dim -> row after heads head_dim"
                    )
                    for x in (keys, values)
                )
                if layer == len(parts):
                    parts.append([])
                parts[layer].append((new[0][mask], new[1][mask]))  # (tokens x heads x head_dim) each
            for i in chosen:
                slots[i] = list(range(self._size, self._size + len(ids[i])))
                self._size += len(ids[i])
        self._layers = [(torch.cat([k for k, _ in p]), torch.cat([v for _, v in p])) for p in parts]
        return slots


def _common(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    first, last = min(rows), max(rows)  # in lexicographic order: what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]
