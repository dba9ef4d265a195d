"""The ledger of a run: which fact was edited when, in which batch, with which loss, and what that added to the weights.

    <run>/ledger/batch_<n>.safetensors   the batch that ends after n edits
    <run>/ledger/edit_<n>.safetensors    the state after n edits as it was before edits of it were undone
    <run>/ledger/history.jsonl           what was undone and redone, and how the scores changed

A batch's file holds, for each weight, "left/<weight>" (out x n) and "right/<weight>" (in x n) of its update
Delta = L R^T, with a column for each fact (`sphere.factors`); or "whole/<weight>" (out x in) where its rules leave no
such sum. In the file's metadata is what is to be read of it (`Entry`). The file is written before the resume point that
vouches for its batch: one that a kill has left behind is of no batch, and is written again. Which edits are undone
stands in the metadata of the checkpoint that is without them. Knows files and editors; knows nothing of undoing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sphere.checkpoints import list_checkpoints, read_config, resume_state, undone_in
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.factors import BatchUpdates, Factors
from sphere.files import append_line, atomic_path
from sphere.requests import EditRequest
from sphere.runs.config import RunConfig
from sphere.runs.folder import LEDGER_FOLDER
from sphere.runs.memory import Sizes

log = logging.getLogger(__name__)

HISTORY_NAME = "history.jsonl"
FORMAT = 1
WHOLE_BYTES = 2**30  # of a run's whole updates, up to which "auto" keeps them
LEFT, RIGHT, WHOLE = "left/", "right/", "whole/"


@dataclass(frozen=True)
class Entry:
    """One batch of the ledger, without its updates.

    Attributes:
        batch: its number, from 1.
        n_edits: edits after it.
        when: local time at which it was written, ISO 8601.
        requests: its facts, in order.
        losses: the last loss of each fact's optimisation; None where the method has none.
        by_fact: whether each weight's update is kept as a sum over the facts.
        kept: whether each weight's update is kept at all.
    """

    batch: int
    n_edits: int
    when: str
    requests: tuple[EditRequest, ...]
    losses: tuple[float | None, ...]
    by_fact: bool
    kept: bool

    @property
    def case_ids(self) -> tuple[int, ...]:
        """Of its facts."""
        return tuple(request.case_id for request in self.requests)


class Ledger:
    """What a run that is being made writes into its ledger.

    Args:
        keep: the setting `ledger`: auto, all or none.
        n_batches: of the run, which decides whether "auto" keeps whole updates.

    Attributes:
        undone: case_ids of the edits that the editor's weights, as the run left them, are without.
    """

    def __init__(self, folder: Path, editor: Editor, keep: str, n_batches: int) -> None:
        self.folder, self.editor, self.keep = folder, editor, keep
        size = sum(editor.weights.get(name).nbytes for name in editor.weights.names)
        self.keep_whole = keeps_whole(keep, n_batches * size)
        self.undone = undone_when_continued(folder, editor.n_edits)  # in its weights, and in all that follow

    def updates(self, n_requests: int) -> BatchUpdates | None:
        """What takes the updates of the next batch; None where none are kept."""
        return None if self.keep == "none" else BatchUpdates(n_requests, self.keep_whole)

    def write(
        self, batch: int, n_edits: int, requests: Sequence[EditRequest], updates: BatchUpdates | None
    ) -> None:
        """Put a batch on record, atomically.

        Args:
            batch: its number, from 1.
            n_edits: edits after it.
        """
        factors, whole = (updates.factors(), updates.whole()) if updates else ({}, {})
        names = set(self.editor.weights.names)
        losses = [self.editor.services.losses.get(request.case_id) for request in requests]
        entry = Entry(
            batch,
            n_edits,
            datetime.now().astimezone().isoformat(timespec="seconds"),
            tuple(requests),
            tuple(losses),
            by_fact=names == factors.keys() and not self.editor.rules.total,
            kept=names == factors.keys() | whole.keys(),
        )
        tensors: dict[str, Tensor] = {f"{WHOLE}{name}": delta.contiguous() for name, delta in whole.items()}
        for name, (left, right) in factors.items():
            tensors |= {f"{LEFT}{name}": left, f"{RIGHT}{name}": right}
        content = json.dumps({"format": FORMAT, **asdict(entry)}, ensure_ascii=False)
        kept_path(self.folder, n_edits).unlink(missing_ok=True)  # of this batch as a killed run wrote it
        with atomic_path(batch_path(self.folder, n_edits)) as temporary:
            save_file(tensors, temporary, metadata={"ledger": content})


def keeps_whole(keep: str, n_bytes: int) -> bool:
    """Whether updates that are no sums over facts are kept: by "auto" where those of a run take at most 1 GiB."""
    return keep == "all" or (keep == "auto" and n_bytes <= WHOLE_BYTES)


def ledger_bytes(config: RunConfig, sums: bool, sizes: Sizes) -> int:
    """What a run's ledger will take on the disk.

    Args:
        sums: whether the updates are sums over facts.
    """
    if config.ledger == "none":
        return 0
    if sums:
        return sizes.exact_bytes * sizes.n_edits * sum(map(sum, sizes.edited))
    whole = sizes.exact_bytes * sizes.entries * -(-sizes.n_edits // sizes.num_edits)
    return whole if keeps_whole(config.ledger, whole) else 0


def batch_path(folder: Path, n_edits: int) -> Path:
    """The file of the batch that ends after so many edits."""
    return folder / LEDGER_FOLDER / f"batch_{n_edits}.safetensors"


def kept_path(folder: Path, n_edits: int) -> Path:
    """Where the state after so many edits is kept as it was edited, while edits of it are undone."""
    return folder / LEDGER_FOLDER / f"edit_{n_edits}.safetensors"


def read_entries(folder: str | Path) -> list[Entry]:
    """The batches of a run's ledger, in order; those that its state does not hold are left out.

    Raises:
        SphereError: no run, one without a ledger, or a damaged file.
    """
    folder = Path(folder)
    n_edits = current_edits(folder)
    entries = [_entry(path) for path in _batch_files(folder)]
    entries = sorted((one for one in entries if one.n_edits <= n_edits), key=lambda one: one.n_edits)
    if not entries:
        known = read_config(folder).get("ledger")
        reason = "it has no edits yet" if known else "an earlier version made it"
        raise SphereError(f"The run in {folder} has no ledger: {reason}.", argument="run")
    return entries


def _batch_files(folder: Path) -> list[Path]:
    return [
        path for path in (folder / LEDGER_FOLDER).glob("batch_*.safetensors") if path.stem[6:].isdecimal()
    ]


def current_edits(folder: str | Path) -> int:
    """How many edits a run's state holds: that of its resume point, or its last checkpoint where that has more.

    Raises:
        SphereError: no run there.
    """
    last = list_checkpoints(folder)[-1].n_edits
    return max(last, int(resume_state(folder).get("n_edits", 0)))


def undone_cases(folder: str | Path, n_edits: int) -> frozenset[int]:
    """The case_ids of the edits that are undone in a run's state after so many edits.

    The checkpoint of that number says it; where there is none, the resume point.
    """
    for checkpoint in list_checkpoints(folder):
        if checkpoint.n_edits == n_edits and n_edits:
            return undone_in(checkpoint.path)
    return frozenset(resume_state(folder).get("undone", ()))


def undone_when_continued(folder: Path, n_edits: int) -> frozenset[int]:
    """The case_ids of the edits to leave out of a run that goes on after so many edits: those undone in its last state.

    That may be a checkpoint beyond the resume point, where a kill came between the two: the batches up to it are edited
    again.

    Raises:
        SphereError: edits of those batches are undone, which would be lost.
    """
    undone = undone_cases(folder, current_edits(folder))
    edited = [one for one in read_entries(folder) if one.n_edits <= n_edits] if undone else []
    if again := sorted(undone.difference(*(one.case_ids for one in edited))):
        raise SphereError(
            f"The run in {folder} goes on after {n_edits} edits, as it has no later resume point, and edits again what "
            f"is undone of the later ones (case {', '.join(map(str, again[:5]))}{', ...' if again[5:] else ''}): redo "
            "that, continue the run, and undo it then."
        )
    return undone


def read_updates(folder: Path, entry: Entry) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """A batch's updates: weight name -> factors, and weight name -> whole update (out x in).

    Raises:
        SphereError: they were not kept, or the file is damaged.
    """
    path = batch_path(folder, entry.n_edits)
    if not entry.kept:
        raise SphereError(
            f"The updates of batch {entry.batch} in {folder} were not kept (ledger=none; or they are no sums over "
            "facts and large, which ledger=all keeps): no edit of the run can be undone.",
            argument="ledger",
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    whole = {name.removeprefix(WHOLE): t for name, t in tensors.items() if name.startswith(WHOLE)}
    names = [name.removeprefix(LEFT) for name in tensors if name.startswith(LEFT)]
    return {name: Factors(tensors[LEFT + name], tensors[RIGHT + name]) for name in names}, whole


def _entry(path: Path) -> Entry:
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["ledger"])
        if content["format"] != FORMAT:
            raise SphereError(
                f"{path} is of format {content['format']}, this version reads {FORMAT}: update it."
            )
        requests = tuple(EditRequest(**request) for request in content["requests"])
        values = {one.name: content[one.name] for one in fields(Entry)}
        return Entry(**{**values, "requests": requests, "losses": tuple(content["losses"])})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SphereError:
    return SphereError(
        f"The ledger's file {path} is damaged ({error}): restore it; without it no edit of the run can be undone."
    )


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """What was undone and redone, in order; a last line that a kill has cut is left out."""
    path = Path(folder) / LEDGER_FOLDER / HISTORY_NAME
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    events = []
    for line in lines:
        try:
            events.append(dict(json.loads(line)))
        except ValueError:
            log.warning("%s: a line that a kill has cut is left out.", path)
    return events


def add_to_history(folder: Path, event: Mapping[str, Any]) -> None:
    """Add a line to the history, behind whatever a kill has left of the one before."""
    path = folder / LEDGER_FOLDER / HISTORY_NAME
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    append_line(path, ("\n" if cut else "") + json.dumps(event))


def search(
    entries: Sequence[Entry], words: Sequence[str] = (), cases: Sequence[int] = (), batch: int | None = None
) -> list[tuple[Entry, int]]:
    """(batch, place of a fact in it) of the facts with all of these words, up to case, in prompt, subject or target."""

    def wanted(request: EditRequest) -> bool:
        text = " ".join(filter(None, (request.text, request.target_new, request.target_true))).casefold()
        return all(word.casefold() in text for word in words) and (not cases or request.case_id in cases)

    return [
        (entry, place)
        for entry in entries
        if batch is None or entry.batch == batch
        for place, request in enumerate(entry.requests)
        if wanted(request)
    ]


def to_json(entry: Entry, place: int, undone: frozenset[int]) -> Mapping[str, Any]:
    """One fact of the ledger, JSON-able."""
    request = entry.requests[place]
    return {
        "batch": entry.batch,
        "n_edits": entry.n_edits,
        "when": entry.when,
        **asdict(request),
        "loss": entry.losses[place],
        "undone": request.case_id in undone,
    }
