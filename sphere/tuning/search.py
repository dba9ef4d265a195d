"""Trials of a search by Optuna's tree-structured Parzen estimator, kept in a file, the same after a kill as without.

What is suggested is a function of the seed and the finished trials alone: the sampler is made anew for each trial, and
a trial that was running when the process ended is given up and suggested once more. Optuna's journal is the state;
`optuna-dashboard <folder>/study.journal` shows it.

Knows Optuna. Knows nothing of what is tried.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphere.errors import SphereError
from sphere.files import atomic_path
from sphere.tuning.search_space import SearchSpace

STUDY = "sphere"
N_STARTUP = 5  # trials before the estimator takes over from random ones
N_UNPRUNED = 2  # finished trials before one is stopped early: the start and another
INSTALL = "optuna"


def check_optuna() -> None:
    """Raise a SphereError unless Optuna can be imported."""
    if importlib.util.find_spec(INSTALL) is None:
        raise SphereError(
            "Tuning needs the package optuna: run `pip install optuna` (or `pip install sphere-edit[tune]`)."
        )


class Search:
    """A study in a file; one process at a time.

    Args:
        path: the journal; begun where there is none.
        seed: of all suggestions.
    """

    def __init__(self, path: Path, seed: int) -> None:
        check_optuna()
        self.optuna: Any = importlib.import_module("optuna")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.seed = seed
        _mend(path)
        journal = importlib.import_module("optuna.storages.journal")
        storage = self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
        self.study = self.optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=self.optuna.pruners.MedianPruner(n_startup_trials=N_UNPRUNED),
        )
        state = self.optuna.trial.TrialState
        self._finished_states = (state.COMPLETE, state.PRUNED)
        for trial in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self.study.tell(trial.number, state=state.FAIL)

    @property
    def finished(self) -> list[Any]:
        """Trials that ended, by themselves or stopped early, in their order."""
        return self.study.get_trials(deepcopy=False, states=self._finished_states)

    def next(self, space: SearchSpace) -> tuple[Any, dict[str, float]]:
        """The next trial and its values in the units of the search; the first one is the start."""
        done = len(self.finished)
        seed = int(np.random.SeedSequence([self.seed, done]).generate_state(1)[0])
        self.study.sampler = self.optuna.samplers.TPESampler(n_startup_trials=N_STARTUP, seed=seed)
        waiting = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,))
        if not done and not waiting:
            self.study.enqueue_trial(space.start_params)
        trial = self.study.ask()
        return trial, space.suggest(trial)

    def worth_going_on(self, trial: Any, step: int, value: float) -> bool:
        """Note an intermediate value; whether it reaches the median of the earlier trials at this step."""
        trial.report(value, step)
        return not trial.should_prune()

    def finish(self, trial: Any, value: float, pruned: bool, note: Mapping[str, Any]) -> None:
        """Keep what a trial came to; `note` is JSON-able."""
        for key, content in note.items():
            trial.set_user_attr(key, content)
        state = self.optuna.trial.TrialState
        if pruned:
            self.study.tell(trial, state=state.PRUNED)
        else:
            self.study.tell(trial, value)

    def is_pruned(self, trial: Any) -> bool:
        """Whether a finished trial was stopped early."""
        return bool(trial.state == self.optuna.trial.TrialState.PRUNED)


def _mend(path: Path) -> None:
    """Cut what a kill left of a line, and take away the lock of a process that is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.lock").unlink(missing_ok=True)
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(whole)
