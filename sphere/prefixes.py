"""Attention keys and values of constant prefixes: each distinct token is run once, whoever shares it.

Knows token ids and a `LayerStack`. Knows nothing of requests, templates or what comes behind a prefix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sphere.layers import LayerStack
from sphere.padding import packs, pad_left, pad_right
from sphere.prefix_cache import FrozenPrefixCache

Places = list[int]


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

    def inputs(self, prefixes: Sequence[Places], ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Arguments of the model for token ids behind stored prefixes: prefixes left-padded, ids right-padded."""
        device = self.stack.device
        before, after = max(map(len, prefixes)), max(map(len, ids))
        columns = torch.arange(before + after, device=device)[None]
        starts = before - torch.tensor([len(p) for p in prefixes], device=device)[:, None]
        ends = before + torch.tensor([len(i) for i in ids], device=device)[:, None]
        mask = (columns >= starts) & (columns < ends)  # rows x (before + after)
        inputs: dict[str, Any] = {
            "input_ids": pad_right(ids, after, self.pad, device),
            "attention_mask": mask.long(),
            "position_ids": (columns - starts).clamp(min=0)[:, before:],
            "use_cache": before > 0,
        }
        if before:
            inputs["past_key_values"] = self._cache(prefixes, before)
        return inputs

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
            inputs = self.inputs([prefixes[i] for i in chosen], [ids[i] for i in chosen])
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
