"""The edited model that a run leads to, in memory, with what is known of how it came to be.

Knows a run's folder and models. Knows nothing of what is written from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import Checkpoint, list_checkpoints, read_config, undone_in
from sphere.data.records import FILES, SHIPPED, Record, load_records
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import edited_records
from sphere.evaluation.run_model import ModelOptions, load_run_model, model_of
from sphere.evaluation.states import RunStates
from sphere.runs.facts_file import read_run_facts
from sphere.runs.folder import FACTS_NAME
from sphere.weights import EditedWeights


@dataclass
class EditedRun:
    """A run's model at one of its checkpoints.

    Attributes:
        folder: the run's.
        config: its run.json; {} where it has none.
        model_name: what the unedited model was loaded by.
        n_edits: how many are in the weights; 0: the unedited model.
        dtype: the model's, as it was edited.
        model: with the weights after `n_edits`.
        weights: the weights that the run edits, in that model.
        original: the same before all edits, in the model's own orientation, on the CPU.
        edited: the same after `n_edits`.
        notes: sentences on what could not be verified, and on what was undone.
        undone: case_ids of the edits that are not in the weights any more.
    """

    folder: Path
    config: Mapping[str, Any]
    model_name: str
    n_edits: int
    dtype: torch.dtype
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: EditedWeights
    original: dict[str, Tensor]
    edited: dict[str, Tensor]
    notes: list[str]
    undone: frozenset[int] = frozenset()

    def change(self, name: str) -> Tensor:
        """What the edits did to a weight (out x in), in float64."""
        change = self.edited[name].double() - self.original[name].double()
        return self.weights.canonical(name, change)

    def records(self) -> list[Record]:
        """The facts that are edited in it, in their order; [] where they are not at hand."""
        if not self.n_edits or "case_ids" not in self.config:
            return []
        try:
            found = edited_records(self._facts(), self.n_edits, self.config, self.folder)
            return [record for record in found if record.case_id not in self.undone]
        except SphereError:
            return []

    def _facts(self) -> list[Record]:
        """Those of the run's table or of its dataset; nothing is downloaded for this."""
        if (self.folder / FACTS_NAME).exists():
            return read_run_facts(self.folder)[0]
        name, place = str(self.config.get("ds_name")), Path(str(self.config.get("data_dir")))
        there = name in FILES and (name in SHIPPED or (place / FILES[name]).exists())
        return load_records(name, place) if there else []


def chosen_checkpoint(folder: str | Path, n_edits: int | None) -> Checkpoint | None:
    """A checkpoint of a run: the one after `n_edits`, or its last; None for 0, the unedited model.

    Raises:
        SphereError: no such folder or checkpoint.
    """
    checkpoints = list_checkpoints(folder)
    there = {checkpoint.n_edits: checkpoint for checkpoint in checkpoints if checkpoint.n_edits}
    if n_edits == 0:
        return None
    if n_edits is None and there:
        return there[max(there)]
    if n_edits not in there:
        asked = f"no checkpoint after {n_edits} edits" if n_edits is not None else "no edits yet"
        numbers = ", ".join(map(str, (0, *sorted(there))))
        raise SphereError(f"{folder} has {asked}: choose one of {numbers}.", argument="checkpoint")
    return there[n_edits]


def load_edited(
    folder: str | Path,
    checkpoint: int | None = None,
    *,
    model_name: str | None = None,
    device: str = "auto",
    device_map: str | None = None,
) -> EditedRun:
    """Load the model that a run started from, in the dtype that it was edited in, and put a checkpoint into it.

    Args:
        folder: the run's.
        checkpoint: number of edits; None: the last, 0: the unedited model.
        model_name: the unedited model, where it is no longer where run.json says.

    Raises:
        SphereError: no such checkpoint; or the model that the run started from is not at hand, or is another one.
    """
    folder = Path(folder)
    chosen = chosen_checkpoint(folder, checkpoint)
    config = read_config(folder)
    options = ModelOptions(model_name=model_name, device=device, device_map=device_map)
    name, _ = model_of(folder, config, options)
    try:
        model, tokenizer = load_run_model(folder, config, options)
    except SphereError as error:
        if "model_name" not in error.arguments:
            raise
        raise SphereError(
            f"The model that the run in {folder} started from is not at hand: {str(error).rstrip('.')}; or name the "
            "place where it is now.",
            argument="model_name",
        ) from error
    n_edits = chosen.n_edits if chosen else 0
    states = RunStates(model, tokenizer, folder, only=[n_edits])
    weights = EditedWeights(model, list(states.original()))
    original = weights.stored()
    for _ in states:  # leaves the model with the weights of the checkpoint
        pass
    edited = EditedWeights(model, weights.names)
    notes = [states.note] if states.note else []
    undone = undone_in(chosen.path) if chosen else frozenset()
    if undone:
        notes.append(f"{len(undone)} of the {n_edits} edits were undone (`sphere undo`) and are not in it.")
    return EditedRun(
        folder,
        config,
        name,
        n_edits,
        model.dtype,
        model,
        tokenizer,
        edited,
        original,
        edited.stored(),
        notes,
        undone,
    )


def rewrite_only(record: Record) -> Record:
    """A fact with nothing but its rewrite prompt."""
    return replace(record, paraphrase_prompts=(), neighborhood=())
