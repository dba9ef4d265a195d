"""A run's folder: which of the files in it are the run's own, and how a new run takes the place of an old one.

A file is a run's own if its `run.json` vouches for it: the file has a name that this program gives, and the number in
the name is a number of edits at which a batch of that run ends. Nothing else is ever removed or written over.

A new run begins in this order; a kill at any moment leaves the old run whole, or the new one:

    1. its edit_0 is written under a temporary name
    2. its run.json takes the place of the old one; "replaced" in it lists the old run's files: from here on the folder
       is the new run's, and nothing of the old one counts
    3. the listed files are removed, edit_0 gets its name, and run.json is written without the list

What a kill has left undone of step 3 is done when the folder is opened again. Everything here is called by the
process that holds the folder (`sphere.lock`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sphere.checkpoints import (
    CHECKPOINT,
    CONFIG_NAME,
    ORIGINAL_NAME,
    REPLACED,
    read_config,
    write_checkpoint,
    write_config,
)
from sphere.errors import SphereError
from sphere.files import LEFTOVER, is_leftover, remove_files, remove_leftovers, replace
from sphere.lock import HOLDER_NAME, LOCK_NAME
from sphere.runs.batches import batch_ends, parts_of
from sphere.runs.remake import begun_by

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
FACTS_NAME = "facts.json"
LEDGER_FOLDER = "ledger"  # `sphere.runs.ledger`
JOB_NAME = "job.json"  # of a sweep, beside the run that is the job
STAGED_NAME = f".{ORIGINAL_NAME}.next_run{LEFTOVER}"  # a leftover, unless run.json says that it is awaited
BESIDE = (JOB_NAME, LOCK_NAME, HOLDER_NAME)  # not the run's, and in nobody's way

# Paths in a run's folder; each group is a number of edits.
RUN_FILE = re.compile(
    r"""
      run\.json | facts\.json | (?:batches|guard)\.jsonl | edit_(\d+)\.safetensors | resume(?:_(\d+))?\.safetensors
    | ledger/(?: (?:batch|edit)_(\d+)\.safetensors | history\.jsonl )
    | tensorboard/events\.out\.tfevents\.[^/]+
    | summary/(?: summary\.json | cases_edit_(\d+)\.jsonl | state_edit_(\d+)\.json )
    | rect_eval/summary\.json
    | rect_eval/edit_(\d+)/(?:
          state\.json | (?:published_)?(?:reasoning|nli|open_domain_qa|closed_domain_qa)\.jsonl
        | lm_eval/[^/]+(?:\.json|_samples\.jsonl)
      )
    | report/(?: report\.html | tables\.md | (?:paired|comparison)\.json | \.lock | \.lock\.json )
    | report/figures/(?:
          comparison | energy_change | score | paired | whole_model | energy_against_score | retention | cosines
          | downstream | principal_share | guard
      )(?:_\w+)?\.(?:svg|png)
    """,
    re.VERBOSE,
)


def open_folder(folder: Path, *, continue_from_run: bool, overwrite: bool) -> dict[str, Any]:
    """`run.json` of the run to continue, or {} where a new one may begin. Changes nothing of what is there.

    Raises:
        SphereError: there is no run to continue, or something in the folder that nobody has given up.
    """
    clean_up(folder)
    config = read_config(folder)
    if continue_from_run and not config:
        there = foreign_files(folder)
        found = (
            f", but {_some(there)}: choose another output_dir" if there else ": begin it without continuing"
        )
        raise SphereError(
            f"There is no run to continue in {folder}, no {CONFIG_NAME}{found}.",
            argument="output_dir" if there else "continue_from_run",
        )
    if continue_from_run:
        return config
    if config and not overwrite:
        raise SphereError(
            f"{folder} already holds a run: continue it, overwrite it, or choose another output_dir.",
            argument=("continue_from_run", "overwrite", "output_dir"),
        )
    _check_free(folder, overwrite)
    return {}


def _check_free(folder: Path, overwrite: bool) -> None:
    """A run may begin here: whatever it did not write itself stays, and would not be taken for its own."""
    foreign = foreign_files(folder)
    in_the_way = [path for path in foreign if RUN_FILE.fullmatch(path) or CHECKPOINT.fullmatch(path)]
    if in_the_way:
        raise SphereError(
            f"{folder} holds {_some(in_the_way)}, which no {CONFIG_NAME} there vouches for and which would be taken "
            "for the new run's: move them elsewhere, or choose another output_dir.",
            argument="output_dir",
        )
    if foreign and not overwrite:
        raise SphereError(
            f"{folder} holds {_some(foreign)}, which no run wrote: choose another output_dir, or overwrite to begin a "
            "run beside them (they stay).",
            argument=("output_dir", "overwrite"),
        )


def begin(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write what a new run starts with, and remove what is the old one's, last and for good.

    Args:
        config: the content of `run.json`; its command gets the limit that it leaves out.
        weights: the original weights, in the model's own orientation.
    """
    _check_free(folder, overwrite=True)
    staged = folder / STAGED_NAME
    kept = (CONFIG_NAME, ORIGINAL_NAME)  # the new ones take their places
    try:
        write_checkpoint(folder, 0, weights, STAGED_NAME)
        replaced = [path for path in own_files(folder) if path not in kept]
        write_config(folder, {**config, "command": begun_by(config), REPLACED: replaced})
    except BaseException:
        if REPLACED not in read_config(folder):
            staged.unlink(missing_ok=True)
        raise
    finish_beginning(folder)


def clean_up(folder: Path) -> None:
    """Do what a kill has left undone of a beginning, and remove the temporary files that it has left."""
    finish_beginning(folder)
    remove_leftovers(folder)
    remove_leftovers(folder / LEDGER_FOLDER)


def finish_beginning(folder: Path) -> None:
    """Do what is left of a beginning that was broken off after the new `run.json` was written."""
    config = read_config(folder)
    if REPLACED not in config:
        return
    replaced = set(config.pop(REPLACED))
    remove_files(folder, [path for path in _files(folder) if path in replaced and RUN_FILE.fullmatch(path)])
    staged = folder / STAGED_NAME
    if staged.exists():
        replace(staged, folder / ORIGINAL_NAME)
    write_config(folder, config)


def own_files(folder: Path) -> list[str]:
    """What the `run.json` in a folder vouches for, itself included; paths relative to the folder."""
    config = read_config(folder)
    return [path for path in _files(folder) if _is_own(path, config)]


def foreign_files(folder: Path) -> list[str]:
    """What is there beside the run's own files, what a sweep keeps there and temporary files of this program."""
    config = read_config(folder)
    return [path for path in _files(folder) if path not in BESIDE and not _is_own(path, config)]


def _is_own(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a `run.json` vouches for a file."""
    ends = _ends(config)
    if not ends or (path == FACTS_NAME and not config.get("facts")):  # of a run that was made of none
        return False
    match = RUN_FILE.fullmatch(path)
    return match is not None and all(int(number) in ends for number in match.groups() if number)


def _ends(config: Mapping[str, Any]) -> set[int]:
    """Numbers of edits at which a run's batches end, 0 included; none where this is no `run.json` of a run."""
    cases, size = config.get("case_ids"), config.get("num_edits")
    if "alg_name" not in config or not isinstance(cases, list) or not isinstance(size, int) or size < 1:
        return set()
    return {0, *batch_ends(len(cases), size, parts_of(config))}


def _files(folder: Path) -> list[str]:
    """Relative paths of all files and links, but for temporary ones; what a link leads to is not looked at."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        paths = (Path(place, name) for name in (*names, *links) if not is_leftover(name))
        found += [path.relative_to(folder).as_posix() for path in paths]
    return sorted(found)


def _some(paths: list[str], most: int = 3) -> str:
    """The first few of them, in words."""
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
