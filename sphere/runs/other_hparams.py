"""A run that its guard stopped goes on with other hyperparameters, as far as they decide nothing that is written.

    run.json    hparams, hparams_fname    those in force
                hparams_before            [{"n_edits": until then, "hparams": ...}] of the batches before

Knows run.json and methods. Knows nothing of editing, and writes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphere.checkpoints import LOG_NAME, RESUME_PART, read_log
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.methods import Method
from sphere.runs.guard_log import read_guard

log = logging.getLogger(__name__)

BEFORE = "hparams_before"
# Of target values: each batch finds its own.
OF_TARGETS = ("v_lr", "v_num_grad_steps", "v_weight_decay", "clamp_norm_factor", "kl_factor")


def take_other_hparams(
    folder: Path, previous: dict[str, Any], wanted: Mapping[str, Any], editor: Editor
) -> dict[str, Any]:
    """What the `run.json` of a run that is continued is to hold: other hyperparameters, where it goes on with such.

    Args:
        previous: what it holds.
        wanted: the same keys, of today's settings.

    Raises:
        SphereError: the guard has stopped the run, but some that differ decide what it has written already.
    """
    return editor.services.processes.on_main(lambda: _take(folder, previous, wanted, editor.method))


def _take(
    folder: Path, previous: dict[str, Any], wanted: Mapping[str, Any], method: Method
) -> dict[str, Any]:
    lines = read_guard(folder)
    old, new = previous.get("hparams", {}), json.loads(json.dumps(wanted["hparams"]))
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if not changed or not lines or not lines[-1].get("passed"):
        return previous
    carries_state = any(RESUME_PART.fullmatch(path.name) for path in folder.iterdir())
    free = dict.fromkeys((*OF_TARGETS, *(() if carries_state else method.tuned)))
    if strays := [key for key in changed if key not in free]:
        raise SphereError(
            f"The run in {folder} goes on with other values of {', '.join(free)}, but {', '.join(strays)} decide what "
            "it has written already: put those back, or begin another run.",
            argument="hparams_fname",
        )
    batches = read_log(folder / LOG_NAME)
    n_edits = batches[-1]["n_edits"] if batches else 0
    log.info("From %d edits on the run has other hyperparameters: %s.", n_edits, ", ".join(changed))
    earlier = [*previous.get(BEFORE, []), {"n_edits": n_edits, "hparams": old}]
    return {**previous, "hparams": new, "hparams_fname": wanted.get("hparams_fname"), BEFORE: earlier}
