"""A run: a dataset edited into a model in batches, with checkpoints, a log and a resume point on disk.

Knows files and the order of things; the editing itself is `sphere.editor`'s, scoring is `sphere.evaluation`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import (
    CONFIG_NAME,
    RESUME_NAME,
    RESUME_PARTS,
    Checkpoint,
    list_checkpoints,
    read_config,
    read_resume,
    read_weights,
    write_checkpoint,
    write_config,
    write_resume,
)
from sphere.data.records import Record, load_records
from sphere.distributed import Processes, start
from sphere.editor import BatchReport, Editor
from sphere.errors import SphereError
from sphere.files import append_line, atomic_path, check_writable, remove_leftovers
from sphere.hparams import load_hparams
from sphere.methods import EditedModel, get_method
from sphere.models import load_model, model_label
from sphere.runs.config import (
    RunConfig,
    alpha_of,
    describe,
    folder_of,
    hparams_path,
    saved_at,
)
from sphere.runs.lengths import check_records
from sphere.runs.monitor import Monitor, TensorBoardWriter, check_tensorboard

log = logging.getLogger(__name__)

LOG_NAME = "batches.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
# The configuration goes first: without it nothing else counts as a run.
LEFTOVERS = (CONFIG_NAME, "edit_*.safetensors", "edit_*.pth", LOG_NAME, RESUME_NAME, RESUME_PARTS)
LEFTOVER_FOLDERS = ("summary", "rect_eval", "report", TENSORBOARD_FOLDER)


@dataclass
class Run:
    """What a finished run hands to its caller.

    Attributes:
        folder: checkpoints, configuration and log.
        records: the records that were edited, in order.
        reports: one per batch of this session (those before a resume are in the log only).
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    editor: Editor
    records: list[Record]
    reports: list[BatchReport]

    @property
    def processes(self) -> Processes:
        """Those that made the run together, one by default."""
        return self.editor.services.processes


def execute(config: RunConfig, command: str | None = None) -> Run:
    """Load, edit batch after batch, save; with all processes that `torchrun` started, where it did.

    Args:
        command: kept with the configuration; by default the `experiments.evaluate` command of these settings.

    Raises:
        SphereError: anything that the user can mend; checkpoints written so far are kept.
    """
    processes = start(config.device, config.device_map)
    with processes.together():
        return _execute(config, command, processes)


def _execute(config: RunConfig, command: str | None, processes: Processes) -> Run:
    config.check()
    method = get_method(config.alg_name)
    if config.tensorboard:
        check_tensorboard()
    alpha = alpha_of(config)
    hparams = load_hparams(hparams_path(config), method.hparams_class)
    method.rules(hparams, config.beta_hse, alpha)  # bad ratios are reported before anything is loaded
    records = load_records(config.ds_name, config.data_dir, config.dataset_size_limit)
    batches = [records[i : i + config.num_edits] for i in range(0, len(records), config.num_edits)]
    ends = _ends(batches)
    saved = saved_at(config.checkpoints, ends)
    folder = folder_of(config)
    previous = processes.on_main(lambda: _open_folder(folder, config))

    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config.model_name, processes.device, config.dtype, config.device_map)
    log.info(
        "%s on %d records in %d batches of %d.", method.name, len(records), len(batches), config.num_edits
    )
    editor = Editor(
        model,
        tokenizer,
        config.alg_name,
        hparams,
        beta_hse=config.beta_hse,
        alpha=alpha,
        seed=config.seed,
        model_label=model_label(config.model_name),
        stats_dir=config.stats_dir,
        cache_dir=config.cache_dir if config.use_cache else None,
        passes=config.passes,
        context_templates=previous.get("templates"),
        progress=processes.main,
        processes=processes,
    )
    check_records(editor, records)
    if not previous:
        editor.method.prepare()  # what is wrong with it is said before an older run is removed
    decided = _decided(config, alpha, hparams.to_dict(), records, editor.edited)
    _begin_or_continue(folder, decided, previous, editor, describe(config, command))
    monitor = monitor_of(editor, folder, config.log_energy_every)
    board = (
        TensorBoardWriter(folder / TENSORBOARD_FOLDER, editor.n_edits)
        if config.tensorboard and processes.main
        else None
    )
    reports = _edit(editor, batches, folder, saved, monitor, board)
    return Run(folder, model, tokenizer, editor, records, reports)


def _decided(
    config: RunConfig,
    alpha: float,
    hparams: dict[str, Any],
    records: Sequence[Record],
    edited: EditedModel,
) -> dict[str, Any]:
    """What must stay the same when a run is continued."""
    return {
        "alg_name": config.alg_name,
        "hparams": hparams,
        "ds_name": config.ds_name,
        "case_ids": [r.case_id for r in records],
        "requests": hashlib.sha256(repr([r.request for r in records]).encode()).hexdigest(),
        "num_edits": config.num_edits,
        "beta_hse": config.beta_hse,
        "alpha": alpha,
        "seed": config.seed,
        "z_matmul_dtype": config.z_matmul_dtype,
        "model": edited.fingerprint.now(),
        "model_dtype": str(edited.model.dtype),
    }


def _begin_or_continue(
    folder: Path,
    decided: dict[str, Any],
    previous: dict[str, Any],
    editor: Editor,
    description: dict[str, Any],
) -> None:
    """Write what a new run starts with, or take up the resume point of the one that is there."""
    if not previous:
        more = {"templates": editor.services.context_templates, "transposed": editor.weights.transposed}

        def begin() -> None:
            _clear(folder)
            write_checkpoint(folder, 0, editor.weights.stored())
            write_config(folder, description | decided | more)  # last: with it go the original weights

        editor.services.processes.on_main(begin)
        return
    _check_same(previous, decided, folder)
    if point := read_resume(folder):
        editor.load_state(*point)
    elif last := _complete(folder, decided):
        editor.weights.restore(read_weights(last.path))
        editor.n_edits = last.n_edits
    log.info("Continuing %s after %d edits.", folder, editor.n_edits)


def _complete(folder: Path, decided: dict[str, Any]) -> Checkpoint | None:
    """The last checkpoint of a run that is complete, though its resume point was removed."""
    n, last, path = len(decided["case_ids"]), list_checkpoints(folder)[-1], folder / LOG_NAME
    batches = len(path.read_text("utf-8").splitlines()) if path.exists() else 0
    return last if last.n_edits == n and batches == -(-n // decided["num_edits"]) else None


def monitor_of(editor: Editor, folder: Path, every: int) -> Monitor:
    """A monitor whose reference is the unedited weights as the run has saved them, whatever was edited since."""
    original = read_weights(list_checkpoints(folder)[0].path) if every > 0 else {}
    reference = {name: editor.weights.canonical(name, weight) for name, weight in original.items()}
    return Monitor(reference, every, device=editor.edited.device)


def _edit(
    editor: Editor,
    batches: Sequence[Sequence[Record]],
    folder: Path,
    saved: set[int],
    monitor: Monitor,
    board: TensorBoardWriter | None,
) -> list[BatchReport]:
    """The batches that are not yet done; after each one the log, the checkpoint and the resume point are written."""
    ends, main = _ends(batches), editor.services.processes.main
    done = ends.index(editor.n_edits) + 1 if editor.n_edits else 0
    if main:
        _truncate_log(folder, done)
    reports = []
    name = editor.method.name
    with tqdm(total=ends[-1], initial=editor.n_edits, desc=name, unit="edit", disable=not main) as bar:
        for index in range(done, len(batches)):
            try:
                measure = monitor.measure if monitor.due(index) else None
                report = editor.edit([record.request for record in batches[index]], measure)
            except SphereError as error:
                if not main:
                    raise
                where, reason = f"Batch {index + 1} of {len(batches)}", str(error).rstrip(".")
                raise SphereError(f"{where}: {reason}; {_keep_last_state(editor, folder)}.") from error
            reports.append(report)
            if main:
                _save(editor, folder, index, report, report.n_edits in saved)
            if board:
                board.add(report.n_edits, report.seconds, report.layers)
            bar.update(len(batches[index]))
    if board:
        board.close()
    return reports


def _save(editor: Editor, folder: Path, index: int, report: BatchReport, checkpoint: bool) -> None:
    """What a batch leaves on the disk; the resume point comes last: it vouches for the others."""
    if checkpoint:
        write_checkpoint(folder, report.n_edits, editor.final_weights())
    _log_batch(folder, index, report)
    write_resume(folder, *editor.state())


def _keep_last_state(editor: Editor, folder: Path) -> str:
    """Save the weights before a broken batch, to be scored; their resume point is there. Says what was done."""
    if not editor.n_edits:
        return "no batch was written before it"
    path = write_checkpoint(folder, editor.n_edits, editor.final_weights())
    return f"the last good state, after {editor.n_edits} edits, is kept in {path}"


def _ends(batches: Sequence[Sequence[Record]]) -> list[int]:
    ends, total = [], 0
    for batch in batches:
        total += len(batch)
        ends.append(total)
    return ends


def _open_folder(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The configuration of the run to continue, or {}; a run that the user did not give up is never written over."""
    exists = (folder / CONFIG_NAME).exists()
    if config.continue_from_run and not exists:
        raise SphereError(
            f"There is no run to continue in {folder}: leave out --continue_from_run to begin it."
        )
    if exists and not config.continue_from_run and not config.overwrite:
        raise SphereError(
            f"{folder} already holds a run: give --continue_from_run to go on with it, --overwrite to replace it, or "
            "another --output_dir."
        )
    check_writable(folder)
    remove_leftovers(folder)
    return read_config(folder) if config.continue_from_run else {}


def _check_same(previous: dict[str, Any], decided: dict[str, Any], folder: Path) -> None:
    """A run goes on only as the run that it was."""
    different = [key for key, value in decided.items() if previous.get(key) != json.loads(json.dumps(value))]
    if different:
        raise SphereError(
            f"The run in {folder} was begun with other settings ({', '.join(different)}): continue it with the same "
            "ones, or begin anew with --overwrite."
        )


def _clear(folder: Path) -> None:
    """Remove what an earlier run of the same name left, its scores included."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            path.unlink()
    for name in LEFTOVER_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _log_batch(folder: Path, index: int, report: BatchReport) -> None:
    line = {"batch": index, **asdict(report)}
    append_line(folder / LOG_NAME, json.dumps(line))


def _truncate_log(folder: Path, done: int) -> None:
    """Keep the lines of finished batches: a kill may have left a line whose resume point was never written."""
    path = folder / LOG_NAME
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)[:done]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), "utf-8")
