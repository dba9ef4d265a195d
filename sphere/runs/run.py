"""A run: a dataset edited into a model in batches, with checkpoints, a log and a resume point on disk.

Knows files and the order of things; the editing itself is `sphere.editor`'s, scoring is `sphere.evaluation`'s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import (
    LOG_NAME,
    USER_TURN,
    Checkpoint,
    list_checkpoints,
    read_resume,
    read_weights,
    write_checkpoint,
    write_config,
    write_resume,
)
from sphere.data.facts import Facts
from sphere.data.records import Record, shuffled
from sphere.distributed import Processes, start
from sphere.editor import BatchReport, Editor
from sphere.errors import SphereError
from sphere.files import append_line, atomic_path
from sphere.forward.matmul_dtype import MATMUL_DTYPES
from sphere.hparams import ModuleHParams, tuned_on
from sphere.lock import locked
from sphere.methods import get_method
from sphere.models import load_model, model_label
from sphere.runs.batches import batch_ends, cut, parts_of
from sphere.runs.config import RunConfig, describe, saved_at
from sphere.runs.dtypes import USED, z_matmul_dtype_used
from sphere.runs.facts_file import complete_facts, own_facts, records_of, write_facts
from sphere.runs.folder import ORIGINAL_NAME, TENSORBOARD_FOLDER, begin, open_folder
from sphere.runs.guard import Guard, guard_of
from sphere.runs.hparams import hparams_of, hparams_source
from sphere.runs.ledger import Ledger
from sphere.runs.lengths import check_records
from sphere.runs.monitor import Monitor, TensorBoardWriter, check_tensorboard
from sphere.runs.other_hparams import take_other_hparams
from sphere.runs.replay import leave_out_undone
from sphere.runs.resolve import alpha_budget_of, alpha_of, beta_hse_of, folder_of, rules_of
from sphere.runs.sameness import check_prepared, check_same, decided
from sphere.runs.saving import CheckpointWriter
from sphere.values.chat_template import user_turn

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What a finished run hands to its caller.

    Attributes:
        folder: checkpoints, configuration and log.
        records: the records that were edited, in order.
        reports: one per batch of this session (those before a resume are in the log only).
        notes: what a summary of the scores shall say of the facts, by what it speaks of.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    editor: Editor
    records: list[Record]
    reports: list[BatchReport]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> Processes:
        """Those that made the run together, one by default."""
        return self.editor.services.processes


def execute(config: RunConfig, command: str | None = None) -> Run:
    """Load, edit batch after batch, save; with all processes that `torchrun` started, where it did.

    Args:
        command: kept with the configuration; by default the `sphere edit` command of these settings.

    Raises:
        SphereError: anything that the user can fix; checkpoints written so far are kept.
    """
    processes = start(config.device, config.device_map)
    with processes.together():
        config.check()
        method = get_method(config.alg_name)
        if config.tensorboard:
            check_tensorboard()
        hparams = hparams_of(config)
        method.rules(hparams, beta_hse_of(config), alpha_of(config))  # bad ratios are reported first
        facts = processes.on_main(lambda: own_facts(config))
        records = records_of(config, facts)
        _warn_of_tuning_set(config, records)
        saved = saved_at(config.checkpoints, batch_ends(len(records), config.num_edits))
        with locked(folder_of(config), processes):
            return _execute(config, hparams, records, facts, saved, command, processes)


def _warn_of_tuning_set(config: RunConfig, records: Sequence[Record]) -> None:
    """Scores on facts that the hyperparameters were tuned on say too much."""
    seen = tuned_on(hparams_source(config), config.ds_name) & {record.case_id for record in records}
    if seen:
        log.warning(
            "%d of the %d records are among those that the hyperparameters were tuned on: scores on them are too good.",
            len(seen),
            len(records),
        )


def _execute(
    config: RunConfig,
    hparams: ModuleHParams,
    records: list[Record],
    facts: Facts | None,
    saved: set[int],
    command: str | None,
    processes: Processes,
) -> Run:
    """The run itself, in a folder that no other process is at."""
    folder = folder_of(config)
    previous = processes.on_main(
        lambda: open_folder(folder, continue_from_run=config.continue_from_run, overwrite=config.overwrite)
    )
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config.model_name, processes.device, config.dtype, config.device_map)
    turn = previous.get(USER_TURN) or user_turn(tokenizer, config.chat_template)
    notes: dict[str, str] = {}
    if facts:
        records, notes = processes.on_main(
            lambda: complete_facts(model, tokenizer, facts, folder if previous else None, config.passes, turn)
        )
    order = shuffled(records, config.seed) if config.shuffle else records
    batches = cut(order, batch_ends(len(order), config.num_edits))
    log.info(
        "%s on %d records in %d batches of %d.", config.alg_name, len(records), len(batches), config.num_edits
    )
    used = processes.on_main(lambda: z_matmul_dtype_used(config, previous, model))
    templates = previous.get("templates")
    editor = editor_of(config, model, tokenizer, hparams, templates, processes, turn=turn, used=used)
    check_records(editor, order)
    decisive = decided(config, hparams.to_dict(), order, editor)
    held = begin_or_continue(folder, decisive, previous, editor, describe(config, command) | {USED: used})
    if facts:
        processes.on_main(lambda: write_facts(folder, str(config.facts), facts, records, notes))
    first = partial(write_config, folder, held) if previous and held != previous else None
    reports = edit_and_save(config, editor, batches, folder, saved, first)
    return Run(folder, model, tokenizer, editor, order, reports, notes)


def editor_of(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hparams: ModuleHParams,
    templates: Sequence[Sequence[str]] | None,
    processes: Processes,
    *,
    turn: str | None = None,
    used: str | None = None,
) -> Editor:
    """The editor of a run.

    Args:
        templates: the context templates that it began with; None for a new one.
        turn: what prompts are put into; None: what the settings say.
        used: name of the dtype in which the layers above z multiply; None: the one that the settings ask for.
    """
    return Editor(
        model,
        tokenizer,
        config.alg_name,
        hparams,
        beta_hse=beta_hse_of(config),
        alpha=alpha_of(config),
        alpha_budget=alpha_budget_of(config),
        rules=rules_of(config),
        directions=config.directions,
        project=config.project,
        revive_tau=config.revive_tau,
        seed=config.seed,
        model_label=model_label(config.model_name),
        stats_dir=config.stats_dir,
        stats_from=config.stats_from,
        cache_dir=config.cache_dir if config.use_cache else None,
        passes=replace(config.passes, z_matmul_dtype=MATMUL_DTYPES[used or config.z_matmul_dtype]),
        context_templates=templates,
        chat_template=turn or config.chat_template,
        on_breakdown=config.on_breakdown,
        progress=processes.main,
        processes=processes,
    )


def begin_or_continue(
    folder: Path,
    decisive: dict[str, Any],
    previous: dict[str, Any],
    editor: Editor,
    description: dict[str, Any],
) -> dict[str, Any]:
    """Write what a new run starts with, or take up the resume point of the one that is there.

    Returns:
        What run.json is to hold from the first batch on: `previous`, unless the run goes on with other hyperparameters.
    """
    on_main = editor.services.processes.on_main
    if previous:
        previous = take_other_hparams(folder, previous, description | decisive, editor)
        check_same(previous, decisive, folder)
        if digest := previous.get("second_moments"):
            editor.services.second_moments.use(digest)
    editor.method.prepare()  # what is wrong with it is said before an older run is removed
    prepared_from = editor.method.prepared_from()
    if not previous:
        more = {"templates": editor.services.context_templates, "transposed": editor.weights.transposed}
        config = description | decisive | prepared_from | more
        on_main(lambda: begin(folder, config, editor.weights.stored()))
        return config
    check_prepared(previous, prepared_from, folder)
    on_main(lambda: _write_original(folder, editor))
    if point := read_resume(folder):
        editor.load_state(*point)
        leave_out_undone(editor, folder)
    elif last := _complete(folder, previous):
        editor.weights.restore(read_weights(last.path))
        editor.n_edits = last.n_edits
    log.info("Continuing %s after %d edits.", folder, editor.n_edits)
    return previous


def _write_original(folder: Path, editor: Editor) -> None:
    """The original weights, where a full disk or somebody has taken them away; called on the unedited model."""
    if not (folder / ORIGINAL_NAME).exists():
        write_checkpoint(folder, 0, editor.weights.stored())


def _complete(folder: Path, config: dict[str, Any]) -> Checkpoint | None:
    """The last checkpoint of a run that is complete, though its resume point was removed."""
    n, last, path = len(config["case_ids"]), list_checkpoints(folder)[-1], folder / LOG_NAME
    batches = len(path.read_text("utf-8").splitlines()) if path.exists() else 0
    ends = batch_ends(n, config["num_edits"], parts_of(config))
    return last if last.n_edits == n and batches == len(ends) else None


def monitor_of(editor: Editor, folder: Path, every: int) -> Monitor:
    """A monitor whose reference is the unedited weights as the run has saved them, whatever was edited since."""
    original = read_weights(list_checkpoints(folder)[0].path) if every > 0 else {}
    reference = {name: editor.weights.canonical(name, weight) for name, weight in original.items()}
    return Monitor(reference, every, device=editor.edited.device)


def edit_and_save(
    config: RunConfig,
    editor: Editor,
    batches: Sequence[Sequence[Record]],
    folder: Path,
    saved: set[int],
    first: Callable[[], None] | None = None,
) -> list[BatchReport]:
    """The batches that an editor has not yet done, with all that a run keeps of each.

    Args:
        saved: numbers of edits at which checkpoints are written.
        first: done by the main process once all that the first batch needs is there, and before it.
    """
    monitor = monitor_of(editor, folder, config.log_energy_every)
    main = editor.services.processes.main
    board = folder / TENSORBOARD_FOLDER
    writer = TensorBoardWriter(board, editor.n_edits) if config.tensorboard and main else None
    ledger = Ledger(folder, editor, config.ledger, len(batches))
    checkpoints = CheckpointWriter(folder, editor, saved, config.save)
    order = [record for batch in batches for record in batch]
    guard = guard_of(config, editor, order, folder, ledger.undone)
    if first:
        editor.services.processes.on_main(first)
    return _edit(editor, batches, checkpoints, monitor, writer, ledger, guard)


def _edit(
    editor: Editor,
    batches: Sequence[Sequence[Record]],
    checkpoints: CheckpointWriter,
    monitor: Monitor,
    writer: TensorBoardWriter | None,
    ledger: Ledger,
    guard: Guard | None,
) -> list[BatchReport]:
    """The batches that are not yet done; after each one the log, the checkpoint and the resume point are written."""
    ends, main = list(accumulate(map(len, batches))), editor.services.processes.main
    done = ends.index(editor.n_edits) + 1 if editor.n_edits else 0
    if main:
        _truncate_log(ledger.folder, done)
    reports = []
    name = editor.method.name
    with tqdm(total=ends[-1], initial=editor.n_edits, desc=name, unit="edit", disable=not main) as bar:
        for index in range(done, len(batches)):
            try:
                requests = [record.request for record in batches[index]]
                updates = ledger.updates(len(requests)) if main else None
                measure = monitor.measure if monitor.due(index) else None
                check = guard.check(index, len(requests)) if guard else None
                report = editor.edit(requests, measure, updates, check)
            except SphereError as error:
                if not main:
                    raise
                where, reason = f"Batch {index + 1} of {len(batches)}", str(error).rstrip(".")
                raise SphereError(f"{where}: {reason}; {_keep_last_state(checkpoints, ledger)}.") from error
            reports.append(report)
            if main:
                ledger.write(index + 1, report.n_edits, requests, updates)
                _save(editor, ledger, checkpoints, index, report)
            if writer:
                writer.add(report.n_edits, report.seconds, report.layers)
            bar.update(len(batches[index]))
    if writer:
        writer.close()
    if guard:
        guard.finish()
    return reports


def _save(
    editor: Editor, ledger: Ledger, checkpoints: CheckpointWriter, index: int, report: BatchReport
) -> None:
    """What a batch leaves on the disk; the resume point comes last: it vouches for the others."""
    folder, undone = ledger.folder, sorted(ledger.undone)
    if checkpoints.due():
        checkpoints.write(undone)
    _log_batch(folder, index, report)
    tensors, append_only, state = editor.state()
    size = write_resume(folder, tensors, append_only, state | ({"undone": undone} if undone else {}))
    log.info("Resume point after %d edits: %.1f MiB.", report.n_edits, size / 2**20)


def _keep_last_state(checkpoints: CheckpointWriter, ledger: Ledger) -> str:
    """Save the weights before a broken batch, to be scored; their resume point is there. Says what was done."""
    if not (n_edits := checkpoints.editor.n_edits):
        return "no batch was written before it"
    return f"the last good state, after {n_edits} edits, is kept in {checkpoints.write(ledger.undone)}"


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
