"""What must be the same when a run is continued: its settings, facts and model, and what lay beside the model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphere.checkpoints import USER_TURN
from sphere.data.records import Record
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.runs.config import RunConfig
from sphere.runs.resolve import sphere_numbers

log = logging.getLogger(__name__)


def decided(
    config: RunConfig, hparams: dict[str, Any], records: Sequence[Record], editor: Editor
) -> dict[str, Any]:
    """What must stay the same when a run is continued."""
    return {
        "alg_name": config.alg_name,
        "hparams": hparams,
        "ds_name": config.ds_name,
        **digest_of(records),
        "num_edits": config.num_edits,
        **sphere_numbers(config),
        **_unusual(config),
        "seed": config.seed,
        "z_matmul_dtype": config.z_matmul_dtype,
        **({USER_TURN: editor.edited.user_turn} if config.chat_template else {}),
        "model": editor.edited.fingerprint.now(),
        "model_dtype": str(editor.edited.model.dtype),
    }


def _unusual(config: RunConfig) -> dict[str, Any]:
    """Rules that are not the published ones, and another order than the file's; earlier versions had neither."""
    keys = ("rules", "directions", "project", "revive_tau", "shuffle")
    return {key: getattr(config, key) for key in keys if getattr(config, key) != getattr(RunConfig, key)}


def digest_of(records: Sequence[Record]) -> dict[str, Any]:
    """The facts of a run, as its `run.json` names them."""
    return {
        "case_ids": [r.case_id for r in records],
        "requests": hashlib.sha256(repr([r.request for r in records]).encode()).hexdigest(),
    }


def check_same(previous: dict[str, Any], decided: dict[str, Any], folder: Path) -> None:
    """A run goes on only as the run that it was."""
    different = [key for key, value in decided.items() if previous.get(key) != json.loads(json.dumps(value))]
    if different:
        raise SphereError(
            f"The run in {folder} was begun with other settings ({', '.join(different)}): continue it with the same "
            "ones, or overwrite it.",
            argument="overwrite",
        )


def check_prepared(previous: dict[str, Any], prepared_from: dict[str, str], folder: Path) -> None:
    """And with the same numbers beside the model, whatever lies in their place today."""
    for key, digest in prepared_from.items():
        what = key.replace("_", " ")
        if key not in previous:
            log.warning(
                "The run in %s does not say which %s it began with: taking those of today.", folder, what
            )
        elif previous[key] != digest:
            raise SphereError(
                f"The run in {folder} was begun with other {what} than those of today: put those back into stats_dir, "
                "or overwrite the run.",
                argument=("stats_dir", "overwrite"),
            )
