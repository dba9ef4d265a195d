"""Which facts of a run are scored: all, or a sample where scoring thousands takes too long.

Knows records and numbers. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sphere.data.records import Record
from sphere.errors import SphereError


class ScoredFacts:
    """The facts of a run, or at most so many of those that a checkpoint holds, drawn by the seed.

    A fact that is drawn at a checkpoint is drawn at every earlier one that holds it: checkpoints are compared on as
    many of the same facts as can be, and so are runs on the same facts.

    Args:
        records: of all edits, in the order of editing.
        limit: how many are scored at most; 0: all.
    """

    def __init__(self, records: Sequence[Record], limit: int, seed: int) -> None:
        self.records, self.limit = records, limit
        self._rank = np.random.default_rng(seed).permutation(len(records))

    def of(self, n_edits: int) -> list[Record]:
        """Those of the first `n_edits` that are scored, in the order of editing."""
        first = self.records[:n_edits]
        if not self.limit or len(first) <= self.limit:
            return list(first)
        last = np.partition(self._rank[:n_edits], self.limit - 1)[self.limit - 1]
        return [record for record, rank in zip(first, self._rank, strict=False) if rank <= last]

    def of_any(self, n_edits: Iterable[int]) -> list[Record]:
        """Those that are scored at one of these numbers of edits at least, in the order of editing."""
        chosen = {record.case_id for n in n_edits for record in self.of(n)}
        return [record for record in self.records if record.case_id in chosen]


def check_scored_facts(limit: int, text: bool) -> None:
    """Raise a SphereError for a limit below 0, or one beside generated text."""
    if limit < 0:
        raise SphereError(f"scored_facts must be at least 0, got {limit}.", argument="scored_facts")
    if limit and text:
        raise SphereError(
            "A sample of the facts is scored, and text is generated for the first ones, of which it holds few: leave "
            "out one of the two.",
            argument="scored_facts",
        )
