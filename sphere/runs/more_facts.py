"""A run that goes on with further facts: the same method, settings and model, from the very state that it is in.

Its `run.json` then names all facts, and where each part of them begins (`sphere.runs.batches`); its `facts.json` holds
them. Both are written just before the first of the new batches, when nothing else can be refused, facts.json first: a
run whose run.json does not name the new facts is as it was. Knows runs and facts; the batches themselves are
`sphere.runs.run`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from sphere.checkpoints import LOG_NAME, RESUME_NAME, USER_TURN, read_config, write_config
from sphere.data.formats import Kind
from sphere.data.records import Record, load_records
from sphere.distributed import Processes, start
from sphere.errors import SphereError
from sphere.hparams import ModuleHParams, hparams_from_dict
from sphere.lock import locked
from sphere.methods import get_method
from sphere.models import load_model
from sphere.runs.batches import PARTS, batch_ends, cut, parts_of
from sphere.runs.config import OWN_FACTS, RunConfig, config_in, saved_at
from sphere.runs.dtypes import z_matmul_dtype_used
from sphere.runs.facts_file import complete_facts, own_facts, read_run_facts, write_all_facts
from sphere.runs.folder import FACTS_NAME, foreign_files, open_folder
from sphere.runs.hparams import hparams_of
from sphere.runs.lengths import check_records
from sphere.runs.remake import CONTINUED, continuation
from sphere.runs.run import Run, begin_or_continue, edit_and_save, editor_of
from sphere.runs.sameness import decided, digest_of
from sphere.values.context_templates import BARE

log = logging.getLogger(__name__)

# What may be another than the run began with: where things are, how they are computed and watched, and, where its guard
# has stopped the run, the hyperparameters.
FREE = (
    "model_name",
    "device",
    "device_map",
    "data_dir",
    "stats_dir",
    "stats_from",
    "cache_dir",
    "checkpoints",
    "ledger",
    "log_energy_every",
    "tensorboard",
    "batch_tokens",
    "conserve_memory",
    "use_cache",
    "on_breakdown",
    "guard",
    "guard_limits",
    "hparams_dir",
    "hparams_fname",
)
# Settings of the further facts, not of the run, and what they are where they are not given.
OF_FACTS: Mapping[str, Any] = {
    "facts": None,
    "subjects": None,
    "on_bad_record": RunConfig.on_bad_record,
    "dataset_size_limit": None,
}


def continue_run(folder: str | Path, given: Mapping[str, Any]) -> tuple[Run, RunConfig]:
    """Go on with a run, with the further facts that `given["facts"]` names, or without any to its end.

    Args:
        given: settings by name, those of OF_FACTS where there are further facts, and those of FREE. Others may be given
            as the run has them; what is not given is the run's own.

    Returns:
        The run, and its settings.

    Raises:
        SphereError: no run, a setting that the run has decided otherwise, a run without its resume point, or facts that
            cannot be used. The run is then as it was.
    """
    folder = Path(folder)
    own = read_config(folder)
    device, device_map = (given.get(name, own.get(name)) for name in ("device", "device_map"))
    processes = start(device or RunConfig.device, device_map)
    with processes.together(), locked(folder, processes):
        return _continue(folder, given, processes)


def _settings(stored: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[RunConfig, RunConfig]:
    """The settings of the run, and those that its further facts are read with; the same where there are none."""
    begun = replace(config_in(stored), continue_from_run=False, overwrite=False)  # said of another command
    further = begun
    if given.get("facts") is not None:
        of_facts = {name: given.get(name, default) for name, default in OF_FACTS.items()}
        further = replace(begun, ds_name=OWN_FACTS, **of_facts)
    fixed = [
        name
        for name, value in given.items()
        if name not in FREE and value not in (getattr(begun, name), getattr(further, name))
    ]
    if fixed:
        raise SphereError(
            f"The run that is continued has its own {', '.join(fixed)}: leave that out, or begin a new run.",
            argument=fixed,
        )
    free = {name: given[name] for name in FREE if name in given}
    config, further = replace(begun, **free), replace(further, **free)
    further.check()
    return config, further


def _continue(folder: Path, given: Mapping[str, Any], processes: Processes) -> tuple[Run, RunConfig]:
    stored = processes.on_main(lambda: open_folder(folder, continue_from_run=True, overwrite=False))
    config, further = _settings(stored, given)
    facts = processes.on_main(lambda: own_facts(further)) if given.get("facts") is not None else None
    torch.manual_seed(config.seed)
    earlier, notes = run_records(folder, stored, config)
    if facts and _are_last(facts.records, earlier, parts_of(stored)[-1]):
        facts = None
    if facts:
        _check_state(folder)
        _check_place(folder, stored)
    model, tokenizer = load_model(config.model_name, processes.device, _dtype(stored), config.device_map)
    turn = stored.get(USER_TURN, BARE)
    added: list[Record] = []
    if facts:
        new = replace(facts, records=_renumbered(facts.records, earlier, earlier[0].kind))
        added, more = processes.on_main(
            lambda: complete_facts(model, tokenizer, new, None, config.passes, turn)
        )
        begin = len(earlier)
        notes |= {f"{key}_after_{begin}": f"Of the facts after {begin}: {note}" for key, note in more.items()}
    records = [*earlier, *added]
    if added:
        config = replace(config, ds_name=OWN_FACTS, facts=str(further.facts))
    hparams = _hparams(stored, config, given)
    used = processes.on_main(lambda: z_matmul_dtype_used(config, stored, model))
    editor = editor_of(
        config, model, tokenizer, hparams, stored["templates"], processes, turn=turn, used=used
    )
    check_records(editor, records)
    extended = _extended(stored, config, records, len(added), continuation(folder, given))
    decisive = decided(config, hparams.to_dict(), records, editor)
    ends = batch_ends(len(records), config.num_edits, parts_of(extended))
    batches, saved = cut(records, ends), saved_at(config.checkpoints, ends)
    held = begin_or_continue(folder, decisive, extended, editor, {"hparams_fname": config.hparams_fname})

    def write() -> None:
        if added:
            write_all_facts(folder, str(config.facts), records, notes, facts.bad if facts else [])
        if held != stored:
            write_config(folder, held)

    reports = edit_and_save(config, editor, batches, folder, saved, write)
    return Run(folder, model, tokenizer, editor, records, reports, notes), config


def _hparams(stored: Mapping[str, Any], config: RunConfig, given: Mapping[str, Any]) -> ModuleHParams:
    """Those of the run, or of the file that is given."""
    if given.get("hparams_fname") is not None:
        return hparams_of(config)
    return hparams_from_dict(stored["hparams"], get_method(config.alg_name).hparams_class)


def _dtype(stored: Mapping[str, Any]) -> str:
    return str(stored["model_dtype"]).removeprefix("torch.")


def run_records(
    folder: Path, stored: Mapping[str, Any], config: RunConfig
) -> tuple[list[Record], dict[str, str]]:
    """The records of a run in the order of editing, and notes on them.

    Raises:
        SphereError: its dataset is no longer the one that it edited.
    """
    notes: dict[str, str] = {}
    if (folder / FACTS_NAME).exists() and config.facts is not None:
        records, notes = read_run_facts(folder)
    else:
        records = load_records(config.ds_name, config.data_dir)
    by_id = {record.case_id: record for record in records}
    found = [by_id[case_id] for case_id in stored["case_ids"] if case_id in by_id]
    if digest_of(found)["requests"] != stored["requests"]:
        raise SphereError(
            f"The facts of the run in {folder} are not to be had as it edited them: {FACTS_NAME} or the dataset "
            f"'{config.ds_name}' is another one; put it back.",
            argument="data_dir",
        )
    return found, notes


def _are_last(new: Sequence[Record], earlier: Sequence[Record], begin: int) -> bool:
    """Whether these facts are the run's last part already: the command was given before, and is to go on."""

    def said(record: Record) -> tuple[str, str, str, str | None]:
        request = record.request
        return request.prompt, request.subject, request.target_new, request.joiner

    same = list(map(said, new)) == list(map(said, earlier[begin:]))
    if same:
        log.info("These %d facts are the run's last ones already: going on with them.", len(new))
    return same


def _renumbered(new: Sequence[Record], earlier: Sequence[Record], kind: Kind) -> list[Record]:
    """Facts that are scored as this kind; those whose case_ids the run has already get the next free ones."""
    taken = {record.case_id for record in earlier}
    free = count(max(taken | {record.case_id for record in new}) + 1)
    found = []
    for record in new:
        case_id = next(free) if record.case_id in taken else record.case_id
        request = replace(record.request, case_id=case_id)
        found.append(replace(record, case_id=case_id, request=request, kind=kind))
    if changed := sum(a.case_id != b.case_id for a, b in zip(new, found, strict=True)):
        log.info("%d case_ids are taken by earlier edits and were changed: see `sphere log`.", changed)
    return found


def _check_state(folder: Path) -> None:
    """What later batches depend on must be there, beside the weights."""
    log_path = folder / LOG_NAME
    edited = log_path.exists() and log_path.stat().st_size > 0
    if edited and not (folder / RESUME_NAME).exists():
        raise SphereError(
            f"The resume point of the run in {folder} is gone ({RESUME_NAME}): without its earlier keys and random "
            "state no further facts can be added; begin a new run with all facts."
        )


def _check_place(folder: Path, stored: Mapping[str, Any]) -> None:
    """What lies in the place of the run's facts is its own, or was left by a kill as facts were added."""
    if FACTS_NAME not in foreign_files(folder):
        return
    with suppress(SphereError, ValueError):  # no table of ours
        kept, _ = read_run_facts(folder)
        if digest_of(kept[: len(stored["case_ids"])])["requests"] == stored["requests"]:
            return
    raise SphereError(
        f"{folder} holds {FACTS_NAME}, which no run wrote there and which the facts of this one would replace: move it "
        "elsewhere.",
        argument="facts",
    )


def _extended(
    stored: Mapping[str, Any], config: RunConfig, records: Sequence[Record], n_added: int, command: str
) -> dict[str, Any]:
    """run.json with the new facts, and the command that added them; as it was, where there are none."""
    if not n_added:
        return dict(stored)
    begin = len(records) - n_added
    event = {
        "facts": config.facts,
        "n_edits": begin,
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }
    return {
        **stored,
        **digest_of(records),
        "ds_name": config.ds_name,
        "facts": config.facts,
        PARTS: [*parts_of(stored), begin],
        CONTINUED: [*stored.get(CONTINUED, ()), event],
    }
