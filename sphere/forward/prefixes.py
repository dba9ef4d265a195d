"""Attention keys and values of constant prefixes: each distinct token is run once, whoever shares it.

Knows token ids and a `LayerStack`. Knows nothing of requests, templates or what comes behind a prefix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphere.forward.layers import LayerStack
from sphere.forward.packing import additive_mask
from sphere.forward.padding import packs, pad_left, pad_right
from sphere.forward.prefix_cache import FrozenPrefixCache

Places = list[int]
NOBODY = -1  # owner of padding


class Segment(NamedTuple):
    """Token ids behind a stored prefix."""

    behind: Places
    ids: Sequence[int]


class PrefixStore:
    """Keys and values by token and layer; a prefix is the list of its tokens' places in the store.

    Args:
        pad: token id to fill rows with.
        batch_tokens: how many (padded) tokens one forward pass may compute.
    """

    def __init__(self, stack: LayerStack, pad: int, batch_tokens: int) -> None:
        self.stack, self.pad, self.batch_tokens = stack, pad, batch_tokens
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys, values: (tokens x heads x head_dim) each
        self._size = 0

    def add(self, prefixes: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> list[Places]:
        """Run prefixes (of token ids); what all of a group begin with is run once for the group.

        Returns:
            the places of each prefix.
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
        places = {key: root + mine for (key, (root, _)), mine in zip(rest.items(), own, strict=True)}
        return [places[group, *prefix] for prefix, group in zip(prefixes, groups, strict=True)]

    def inputs(self, lines: Sequence[Sequence[Segment]]) -> dict[str, Any]:
        """Arguments of the model for lines of segments, prefixes left-padded, token ids right-padded.

        Segments that share a line do not see each other, which takes a model that heeds such masks
        (`LayerStack.takes_trees`); for lines of one segment any model will do.
        """
        device = self.stack.device
        prefixes = [[place for segment in line for place in segment.behind] for line in lines]
        ids = [[token for segment in line for token in segment.ids] for line in lines]
        positions = [[len(s.behind) + i for s in line for i in range(len(s.ids))] for line in lines]
        before, after = max(map(len, prefixes)), max(map(len, ids))
        inputs: dict[str, Any] = {
            "input_ids": pad_right(ids, after, self.pad, device),
            "attention_mask": self._mask(lines, before, after),
            "position_ids": pad_right(positions, after, 0, device),
            "use_cache": before > 0,
        }
        if before:
            inputs["past_key_values"] = self._cache(prefixes, before)
        return inputs

    def _mask(self, lines: Sequence[Sequence[Segment]], before: int, after: int) -> Tensor:
        """(lines x (before + after)) of present tokens; of segments in common lines, what each token sees."""
        device, model = self.stack.device, self.stack.model
        behind = [[n for n, s in enumerate(line) for _ in s.behind] for line in lines]
        own = [[n for n, s in enumerate(line) for _ in s.ids] for line in lines]
        queries = pad_right(own, after, NOBODY, device)
        keys = torch.cat([pad_left(behind, before, NOBODY - 1, device), queries], dim=1)
        if max(map(len, lines)) == 1:
            return (keys >= 0).long()
        sees = queries[:, :, None] == keys[:, None, :]  # lines x after x (before + after)
        sees[:, :, before:] &= torch.ones(after, after, dtype=torch.bool, device=device).tril()
        return additive_mask(sees, model.get_input_embeddings().weight.dtype)

    def _cache(self, prefixes: Sequence[Places], width: int) -> FrozenPrefixCache:
        """The keys and values of stored prefixes, left-padded to `width`."""
        places = pad_left(prefixes, width, 0, self.stack.device)
        cache = FrozenPrefixCache()
        for layer, stored in enumerate(self._layers):
            at = places.to(stored[0].device)
            keys, values = (part[at].transpose(1, 2).contiguous() for part in stored)
            cache.update(keys, values, layer)  # rows x heads x width x head_dim
        return cache.freeze()

    @torch.no_grad()
    def _extend(self, prefixes: Sequence[Places], ids: Sequence[Sequence[int]]) -> list[Places]:
        """Run token ids behind stored prefixes and store them, too: the places of the ids."""
        places: list[Places] = [[] for _ in ids]
        parts = [[pair] for pair in self._layers]
        filled = [i for i, row in enumerate(ids) if row]
        for group in packs([len(ids[i]) for i in filled], self.batch_tokens, self.stack.pass_overhead):
            chosen = [filled[i] for i in group]
            inputs = self.inputs([[Segment(prefixes[i], ids[i])] for i in chosen])
            own = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].bool()  # rows x after
            for layer, (keys, values) in enumerate(self.stack.fill_cache(inputs).keys_and_values()):
                mask = own.to(keys.device)
                new = tuple(x[:, :, -mask.shape[1] :].transpose(1, 2)[mask] for x in (keys, values))
                if layer == len(parts):
                    parts.append([])
                parts[layer].append((new[0], new[1]))
            for i in chosen:
                places[i] = list(range(self._size, self._size + len(ids[i])))
                self._size += len(ids[i])
        self._layers = [(torch.cat([k for k, _ in p]), torch.cat([v for _, v in p])) for p in parts]
        return places


def _common(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    first, last = min(rows), max(rows)  # in lexicographic order: what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]
