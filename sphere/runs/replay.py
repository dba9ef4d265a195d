"""A run's weights without some of its edits, from the original ones and the ledger.

The edits that stay are added to W_0 again, batch after batch in their order and in float32, as they were added first;
so the result does not depend on what was undone when, and without any edit it is W_0, bit for bit. With all of them it
differs from the run's own weights by the rounding of factors to float32. Knows the ledger, weights and rules.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from sphere.checkpoints import resume_state
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.ready_rules import ReadyRules
from sphere.runs.ledger import Entry, read_entries, read_updates, undone_when_continued

log = logging.getLogger(__name__)


def replay(ready: ReadyRules, folder: Path, entries: Sequence[Entry], undone: Collection[int]) -> None:
    """Put the edits that are not undone into the weights that `ready` holds.

    Args:
        entries: all batches of the state, in order.
        undone: case_ids of the edits to leave out.

    Raises:
        SphereError: a batch's updates were not kept, or hold no sum over its facts where only some are to stay. The
            weights are then as they were.
    """
    weights, started = ready.weights, False
    before = weights.snapshot("cpu")
    try:
        weights.restore(ready.original)
        for entry in entries:
            if all(case in undone for case in entry.case_ids):
                continue
            if started:
                ready.continue_conditioned()
            for name, delta in _deltas(folder, entry, undone).items():
                weights.add_(name, delta.to(weights.get(name)))
            started = True
    except BaseException:
        weights.restore(before)
        raise


def leave_out_undone(editor: Editor, folder: Path) -> None:
    """Where edits were undone since an editor's resume point was written: put the weights without them in place.

    Raises:
        SphereError: some of them cannot be left out, see `sphere.runs.ledger.undone_when_continued`.
    """
    undone = undone_when_continued(folder, editor.n_edits)
    if undone == frozenset(resume_state(folder).get("undone", ())):
        return
    log.info("%d edits of %s are undone: going on without them.", len(undone), folder)
    replay(
        editor.ready_rules,
        folder,
        [one for one in read_entries(folder) if one.n_edits <= editor.n_edits],
        undone,
    )


def _deltas(folder: Path, entry: Entry, undone: Collection[int]) -> dict[str, Tensor]:
    """What the facts of a batch that stay add to each weight (out x in)."""
    factors, whole = read_updates(folder, entry)
    staying = [place for place, case in enumerate(entry.case_ids) if case not in undone]
    if len(staying) == len(entry.case_ids):
        return {name: one.delta() for name, one in factors.items()} | whole
    if not entry.by_fact:
        raise SphereError(no_sum(entry))
    return {name: one.delta(staying) for name, one in factors.items()}


def no_sum(entry: Entry) -> str:
    """Why one fact of a batch cannot be undone."""
    return (
        f"The update of batch {entry.batch} is no sum over its facts (the method's rules act on all of it at once), so "
        f"that one of them cannot be taken out: undo the whole batch {entry.batch}."
    )


def check_updates(folder: Path, entries: Sequence[Entry], n_edits: int) -> None:
    """Find out before anything is computed that all updates of a state are on record.

    Raises:
        SphereError: some are not.
    """
    covered = 0
    for entry in entries:
        if entry.n_edits - len(entry.requests) != covered:
            break
        covered = entry.n_edits
        if not entry.kept:
            read_updates(folder, entry)  # says why
    if covered != n_edits:
        raise SphereError(
            f"The ledger in {folder} does not hold the batch after {covered} edits, so that nothing can be undone: the "
            "file is gone, or an earlier version edited it."
        )
