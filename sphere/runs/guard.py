"""Stop before it breaks: a look at the model after each batch, and an end to the run where something moved too far.

What was seen is kept in the run's folder (`sphere.runs.guard_log`). Knows editors, records and limits.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sphere.data.records import Record
from sphere.editor import Check, Editor
from sphere.errors import SphereError
from sphere.evaluation.watch import ModelWatch, Watched
from sphere.files import append_line
from sphere.rules import Metrics
from sphere.runs.config import RunConfig
from sphere.runs.guard_limits import LIMITS, parse_limits, passed
from sphere.runs.guard_log import GUARD_NAME, forget_later, read_guard

log = logging.getLogger(__name__)

FEWEST = 16  # edits from which on the fraction that hold is compared


class GuardStopError(SphereError):
    """A batch moved what must not break too far; it was not kept."""


class Guard:
    """Looks at an editor's model after each batch of a run.

    Made when the editor is where the run goes on: lines of later batches that a kill or a stop has left are removed.
    The main process looks, and what it finds ends all.

    Args:
        records: all records of the run, in the order of editing.
        folder: the run's.
        limits: name -> largest value, see `sphere.runs.guard_limits.parse_limits`.
        undone: case_ids of the edits that were taken out of the weights again.
    """

    def __init__(
        self,
        editor: Editor,
        records: Sequence[Record],
        folder: Path,
        limits: Mapping[str, float],
        undone: Collection[int] = (),
    ) -> None:
        self.editor, self.records, self.limits, self.undone = editor, records, dict(limits), undone
        self.path = folder / GUARD_NAME
        self._first_seconds = self._seconds = self._edit_seconds = 0.0
        with editor.weights.temporarily(editor.services.offload_device):
            editor.weights.restore(editor.original)
            editor.services.processes.on_main(self._begin)

    def check(self, batch: int, size: int) -> Check:
        """What `Editor.edit` asks once it has written a batch.

        Args:
            batch: its number, from 0.
            size: its number of edits.
        """

        def look(layers: Mapping[str, Metrics], edit_seconds: float) -> None:
            self.editor.services.processes.on_main(lambda: self._look(batch, size, layers, edit_seconds))

        return look

    def finish(self) -> None:
        """Log what looking has cost."""
        log.info(
            "The guard took %.1f s, %.1f %% of the %.1f s of the batches, and %.1f s before the first.",
            self._seconds,
            100 * self._seconds / max(self._edit_seconds, 1e-9),
            self._edit_seconds,
            self._first_seconds,
        )

    def _begin(self) -> None:
        """Look at the unedited model."""
        start, edited = time.perf_counter(), self.editor.edited
        self._lines = read_guard(self.path.parent)
        passes = self.editor.services.passes
        self._watch = ModelWatch(edited.model, edited.tokenizer, self._weights(), passes, edited.user_turn)
        self._unedited = self._watch.text_and_controls()
        self._first_seconds = time.perf_counter() - start

    def _weights(self) -> dict[str, Tensor]:
        """The edited weights as they stand (out x in)."""
        weights = self.editor.weights
        return {name: weights.get(name) for name in weights.names}

    def _look(self, batch: int, size: int, layers: Mapping[str, Metrics], edit_seconds: float) -> None:
        start, n_edits = time.perf_counter(), self.editor.n_edits + size
        text = self._watch.text_and_controls()
        hold = self._watch.edits_hold(
            [record for record in self.records[:n_edits] if record.case_id not in self.undone]
        )
        weights = self._watch.weights(self._weights(), layers)
        moved = self._moved(n_edits, text, hold, weights)
        beyond = passed(moved, self.limits)
        seconds = time.perf_counter() - start
        line = {
            "batch": batch,
            "n_edits": n_edits,
            "values": _finite({**text, "edits_hold": hold, **weights}),
            "unedited": _finite(self._unedited),
            "moved": _finite(moved),
            "limits": _finite(self.limits),
            "passed": beyond,
            "seconds": seconds,
            "edit_seconds": edit_seconds,
        }
        append_line(self.path, json.dumps(line))
        self._seconds += seconds
        self._edit_seconds += edit_seconds
        log.info(
            "Guard after %d edits: %s; %.1f s, %.1f %% of the batch.",
            n_edits,
            ", ".join(f"{name} {_number(value)}" for name, value in moved.items()),
            seconds,
            100 * seconds / max(edit_seconds, 1e-9),
        )
        if beyond:
            self.finish()
            raise GuardStopError(self._sentence(beyond, moved), argument="guard_limits")
        self._lines.append(line)

    def _moved(self, n_edits: int, text: Mapping[str, float], hold: float, weights: Watched) -> Watched:
        """What `sphere.runs.guard_limits` names, of what was seen; None: nothing to compare."""
        ratio = text["text_perplexity"] / self._unedited["text_perplexity"]
        loss = text["control_nll"] - self._unedited["control_nll"]
        # Of few edits a fraction says little: the first of two fails, and half of them is lost.
        enough = [line for line in self._lines if line["n_edits"] >= FEWEST]
        highest = max([hold, *(line["values"]["edits_hold"] for line in enough)])
        return {
            "perplexity": None if math.isinf(self._unedited["text_perplexity"]) else ratio,
            "control": None if math.isinf(self._unedited["control_nll"]) else loss,
            "edits": highest - hold if n_edits >= FEWEST else None,
            "energy": weights["energy_change"],
            "spectrum": weights["condition_growth"],
        }

    def _sentence(self, beyond: Sequence[str], moved: Watched) -> str:
        """What moved, by how much, and what can be done."""
        earlier = self._lines[-1]["moved"] if self._lines else {}
        parts = []
        for name in beyond:
            past = f", {_number(earlier[name])} after the batch before" if name in earlier else ""
            parts.append(
                f"{LIMITS[name].means} is {_number(moved[name])} (limit {self.limits[name]:g}{past})"
            )
        return (
            f"the guard has stopped the run, as {'; '.join(parts)}: the batch was not kept; score what is there, or "
            "continue the run with other hyperparameters, with larger guard_limits or without the guard"
        )


def guard_of(
    config: RunConfig, editor: Editor, records: Sequence[Record], folder: Path, undone: Collection[int] = ()
) -> Guard | None:
    """The guard of a run, None where it has none; what it looked at and was not kept is forgotten either way."""
    editor.services.processes.on_main(lambda: forget_later(folder, editor.n_edits))
    return Guard(editor, records, folder, parse_limits(config.guard_limits), undone) if config.guard else None


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """As JSON has it, which knows no infinity."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


def _number(value: float | None) -> str:
    return "-" if value is None else "without bounds" if math.isinf(value) else f"{value:.3g}"
