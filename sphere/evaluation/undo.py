"""Taking edits out of a run's weights again, and putting them back; what that does to their facts and to the others.

The last state of a run, `edit_<n>`, gives way to the same state without some edits (`sphere.runs.replay`). One file is
replaced, whose metadata says which edits are undone: a kill leaves the one state or the other. The state as it was
edited is kept in the ledger, so that undoing nothing is that state bit for bit. Knows runs, the ledger and scores.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from torch import Tensor

from sphere.checkpoints import (
    USER_TURN,
    list_checkpoints,
    read_config,
    read_resume,
    read_weights,
    resume_state,
    write_checkpoint,
)
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation.run_model import ModelOptions, load_run_model
from sphere.evaluation.scoring import Case, RecordScorer
from sphere.evaluation.states import RunStates
from sphere.files import atomic_path
from sphere.hparams import hparams_from_dict
from sphere.lock import locked
from sphere.methods import get_method
from sphere.ready_rules import ReadyRules
from sphere.requests import EditRequest
from sphere.runs.config import config_in
from sphere.runs.folder import ORIGINAL_NAME, clean_up
from sphere.runs.hparams import run_rules
from sphere.runs.ledger import (
    Entry,
    add_to_history,
    current_edits,
    kept_path,
    read_entries,
    undone_cases,
)
from sphere.runs.replay import check_updates, no_sum, replay
from sphere.values.context_templates import BARE
from sphere.weights import EditedWeights

UNDO, REDO = "undo", "redo"
WEIGHT = "weight/"  # prefix of the weights in a resume point


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which edits: those of a batch, of these cases, or all that can be."""

    batch: int | None = None
    cases: tuple[int, ...] = ()
    everything: bool = False


@dataclass(frozen=True)
class Efficacy:
    """How well facts are known.

    Attributes:
        n: facts.
        success: mean over them: 1 where the new target is likelier than the true one; without a true one, the fraction
            of the target's tokens that are the argmax. None without facts.
        accuracy: mean over them: 1 where every token of the target is the argmax; without a true one as above.
    """

    n: int
    success: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Changed:
    """What undoing or redoing did.

    Attributes:
        what: "undo" or "redo".
        case_ids: the edits that were chosen.
        n_edits: of the state; `n_undone` of them are undone now.
        path: its file.
        chosen, others: (before, after) of the chosen edits, and of the others that are in the weights.
        exact: "original" or "edited" where the weights are those, bit for bit; "" where they are a sum anew.
    """

    what: str
    case_ids: tuple[int, ...]
    n_edits: int
    n_undone: int
    path: Path
    chosen: tuple[Efficacy, Efficacy]
    others: tuple[Efficacy, Efficacy]
    exact: str


def change(folder: str | Path, what: str, choice: Choice, options: ModelOptions | None = None) -> Changed:
    """Undo or redo edits of a run, in its last state.

    Args:
        what: UNDO or REDO.
        options: where the model is to be had; its dtype is always the run's.

    Raises:
        SphereError: no such edits, edits that are undone (or not) already, updates that are not on record, or one fact
            of an update that is no sum over facts. Nothing is changed then.
    """
    folder = Path(folder)
    list_checkpoints(folder)  # a wrong folder is reported before anything is locked
    with locked(folder):
        clean_up(folder)
        n_edits, entries = current_edits(folder), read_entries(folder)
        undone = undone_cases(folder, n_edits)
        chosen = _chosen(entries, undone, what, choice)
        target = undone | chosen if what == UNDO else undone - chosen
        _check(folder, entries, n_edits, target)
        state = _State(folder, n_edits, entries, undone, options or ModelOptions())
        after, exact = state.without(target)
        requests = [request for entry in entries for request in entry.requests]
        before_cases, after_cases = (state.score(weights, requests) for weights in (state.now, after))
        others = {request.case_id for request in requests} - undone - chosen
        pairs = [(_efficacy(before_cases, some), _efficacy(after_cases, some)) for some in (chosen, others)]
        path = state.commit(after, target)
        ordered = tuple(r.case_id for r in requests if r.case_id in chosen)
        found = Changed(what, ordered, n_edits, len(target), path, pairs[0], pairs[1], exact)
        _note(folder, found)
    return found


def _chosen(entries: Sequence[Entry], undone: frozenset[int], what: str, choice: Choice) -> frozenset[int]:
    """The case_ids of the edits that are meant, all of which can be undone (or redone)."""
    known = {case: entry for entry in entries for case in entry.case_ids}
    state, opposite = ("undone", REDO) if what == UNDO else ("not undone", UNDO)

    def possible(case: int) -> bool:
        return (case in undone) != (what == UNDO)

    if unknown := [case for case in choice.cases if case not in known]:
        raise SphereError(
            f"Case {unknown[0]} is no edit of this run: `sphere log` lists them.", argument="case"
        )
    if wrong := [case for case in choice.cases if not possible(case)]:
        raise SphereError(
            f"Case {wrong[0]} (batch {known[wrong[0]].batch}) is {state} already: {opposite} it, or choose another.",
            argument="case",
        )
    cases = choice.cases
    if choice.batch is not None:
        if not 1 <= choice.batch <= len(entries):
            raise SphereError(
                f"This run has batches 1 to {len(entries)}, no batch {choice.batch}.", argument="batch"
            )
        cases = entries[choice.batch - 1].case_ids
    elif choice.everything:
        cases = tuple(known)
    if not (found := frozenset(filter(possible, cases))):
        which = f"Batch {choice.batch} is" if choice.batch is not None else "All edits are"
        raise SphereError(f"{which} {state} already: {opposite} it, or choose another.", argument="batch")
    return found


def _check(folder: Path, entries: Sequence[Entry], n_edits: int, target: Collection[int]) -> None:
    """The state without these edits can be made."""
    staying = [entry for entry in entries if not all(case in target for case in entry.case_ids)]
    for entry in staying:
        if entry.kept and not entry.by_fact and any(case in target for case in entry.case_ids):
            raise SphereError(no_sum(entry), argument="case")
    if staying and (target or not kept_path(folder, n_edits).exists()):
        check_updates(folder, entries, n_edits)


class _State:
    """The last state of a run, in its model.

    Attributes:
        now: its weights, in the model's own orientation and dtype.
    """

    def __init__(
        self,
        folder: Path,
        n_edits: int,
        entries: Sequence[Entry],
        undone: frozenset[int],
        options: ModelOptions,
    ) -> None:
        self.folder, self.n_edits, self.entries, self.undone = folder, n_edits, entries, undone
        stored = read_config(folder)
        self.turn = stored.get(USER_TURN, BARE)
        self.model, self.tokenizer = load_run_model(folder, stored, options)
        RunStates(self.model, self.tokenizer, folder)  # refuses another model
        self.original = read_weights(folder / ORIGINAL_NAME)
        self.weights = EditedWeights(self.model, list(self.original))
        config = config_in(stored)
        hparams = hparams_from_dict(stored["hparams"], get_method(config.alg_name).hparams_class)
        self.ready = ReadyRules(run_rules(config, hparams), self.weights, self.original)
        self.now = self._now()

    def _now(self) -> dict[str, Tensor]:
        """The weights of its checkpoint; a run that was stopped may have none, and gets it."""
        for checkpoint in list_checkpoints(self.folder):
            if checkpoint.n_edits == self.n_edits:
                return read_weights(checkpoint.path)
        point = read_resume(self.folder)
        assert point is not None
        saved = {
            name.removeprefix(WEIGHT): tensor for name, tensor in point[0].items() if name.startswith(WEIGHT)
        }
        with self.weights.temporarily():
            self.weights.restore(saved)
            final = self.ready.final_weights()
        undone = resume_state(self.folder).get("undone", ())
        write_checkpoint(self.folder, self.n_edits, final, undone=undone)
        return final

    def without(self, undone: Collection[int]) -> tuple[dict[str, Tensor], str]:
        """The weights without these edits, and what they are bit for bit (see `Changed.exact`)."""
        kept = kept_path(self.folder, self.n_edits)
        if not undone and kept.exists():
            return read_weights(kept), "edited"
        if all(case in undone for entry in self.entries for case in entry.case_ids):
            return self.original, "original"
        with self.weights.temporarily():
            replay(self.ready, self.folder, self.entries, undone)
            return self.ready.final_weights(), ""

    def score(self, weights: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> list[Case]:
        """The rewrite prompts of requests, with these weights."""
        records = [Record(r.case_id, r, "zsre" if r.target_true is None else "counterfact") for r in requests]
        with self.weights.temporarily():
            self.weights.restore(weights)
            return RecordScorer(self.model, self.tokenizer, user_turn=self.turn).score(
                records, progress=False
            )

    def commit(self, weights: Mapping[str, Tensor], undone: Collection[int]) -> Path:
        """Make these weights the run's state; the state as it was edited is kept while edits are undone."""
        kept = kept_path(self.folder, self.n_edits)
        if not self.undone and not kept.exists():
            with atomic_path(kept) as temporary:
                shutil.copyfile(self.folder / f"edit_{self.n_edits}.safetensors", temporary)
        path = write_checkpoint(self.folder, self.n_edits, weights, undone=undone)
        if not undone:
            kept.unlink(missing_ok=True)
        return path


def _efficacy(cases: Sequence[Case], chosen: Collection[int]) -> Efficacy:
    rewrites = [case["rewrite"][0] for case in cases if case["case_id"] in chosen]
    if not rewrites:
        return Efficacy(0, None, None)
    success = statistics.fmean(float(one.get("success", one["accuracy"])) for one in rewrites)
    return Efficacy(len(rewrites), success, statistics.fmean(float(one["accuracy"]) for one in rewrites))


def _note(folder: Path, found: Changed) -> None:
    """Add what was done to the ledger's history."""
    event = {
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "what": found.what,
        "case_ids": list(found.case_ids),
        "n_edits": found.n_edits,
        "chosen": [asdict(one) for one in found.chosen],
        "others": [asdict(one) for one in found.others],
    }
    add_to_history(folder, event)
