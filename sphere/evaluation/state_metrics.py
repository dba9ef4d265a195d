"""What is measured of each state beside its cases: perplexity of the fixed text, and how far the weights have moved.

    <folder>/summary/state_edit_<n>.json    both, each beside the key of what it was made by

The weights are compared as checkpoints hold them, with the unedited ones; no model is run for that. Knows states,
checkpoints and files. Knows nothing of records or cases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import LOG_NAME, logged_energy_changes, read_log
from sphere.distributed import Processes
from sphere.evaluation.perplexity import TEXT_NAME, read_paragraphs, text_perplexity
from sphere.evaluation.states import RunStates, State
from sphere.evaluation.weight_change import WeightChange
from sphere.files import read_json, write_json
from sphere.forward.scorer import PackedScorer
from sphere.hypersphere import PLAIN_BETA
from sphere.resources import shipped

FORMAT = 1  # of the numbers; a change has them measured again


class StateMetrics:
    """Perplexity and weight changes of a run's states, kept on disk as they are measured.

    Args:
        scorer: of the model whose states these are.
        folder: where the files go.
        run: the run's folder; its log has energy changes, which are taken from there where they are.
        processes: the main one measures and writes.
    """

    def __init__(
        self,
        scorer: PackedScorer,
        tokenizer: PreTrainedTokenizerBase,
        states: RunStates,
        folder: Path,
        run: Path,
        processes: Processes,
    ) -> None:
        self.scorer, self.tokenizer, self.states = scorer, tokenizer, states
        self.folder, self.processes = folder, processes
        self._paragraphs = read_paragraphs(shipped("data") / TEXT_NAME)
        self._logged = processes.on_main(lambda: logged_energy_changes(read_log(run / LOG_NAME)))
        self._change: WeightChange | None = None

    def measure(self, state: State) -> dict[str, Any]:
        """The model must be in this state.

        Returns:
            text_perplexity (None where it is not finite); weights: see `WeightChange.measure`, None for the unedited
            model.
        """
        return self.processes.on_main(lambda: self._measure(state))

    def _measure(self, state: State) -> dict[str, Any]:
        path = self.folder / f"state_{state.label}.json"
        old = read_json(path, "state's metrics") if path.exists() else {}
        known = old if isinstance(old, dict) else {}
        found = {
            "text_perplexity": self._kept(known, "text_perplexity", self._text_key(state), self._perplexity),
            "weights": self._kept(
                known, "weights", self._weights_key(state), lambda: self._weight_change(state)
            ),
        }
        if found != known:
            write_json(path, found)
        return {name: entry["value"] for name, entry in found.items()}

    @staticmethod
    def _kept(known: Mapping[str, Any], name: str, key: str, make: Callable[[], Any]) -> dict[str, Any]:
        """The entry that is there under this key, or a new one."""
        old = known.get(name)
        if isinstance(old, dict) and old.get("key") == key and "value" in old:
            return old
        return {"key": key, "value": make()}

    def _text_key(self, state: State) -> str:
        text = hashlib.sha256("\n\n".join(self._paragraphs).encode()).hexdigest()
        return state.digest(measured="text_perplexity", format=FORMAT, text=text)

    def _weights_key(self, state: State) -> str:
        logged = json.dumps(self._logged.get(state.n_edits), sort_keys=True)
        unedited = self.states.unedited.digest()
        return state.digest(
            measured="weights", format=FORMAT, beta_hse=PLAIN_BETA, unedited=unedited, logged=logged
        )

    def _perplexity(self) -> float | None:
        return text_perplexity(self.scorer, self.tokenizer, self._paragraphs)

    def _weight_change(self, state: State) -> dict[str, Any] | None:
        if state.checkpoint is None:
            return None
        self._change = self._change or WeightChange(self.states.original(), self.scorer.device)
        weights = self.states.canonical(state.checkpoint)
        return self._change.measure(weights, self._logged.get(state.n_edits, {}))
