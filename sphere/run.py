"""A run: a dataset edited into a model in batches, with checkpoints, a log and a resume point on disk.

Knows files and the order of things; the editing itself is `sphere.editor`'s, scoring is `sphere.evaluation`'s.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import (
    CONFIG_NAME,
    read_config,
    read_resume,
    run_folder,
    write_checkpoint,
    write_config,
    write_resume,
)
from sphere.data import Record, load_records
from sphere.editor import BatchReport, Editor
from sphere.errors import SphereError
from sphere.files import atomic_path
from sphere.hparams import load_hparams
from sphere.methods import get_method
from sphere.models import DEFAULT_MODEL, fingerprint, load_model, model_label

log = logging.getLogger(__name__)

LOG_NAME = "batches.jsonl"
LEFTOVERS = ("edit_*.safetensors", "edit_*.pth", LOG_NAME, "resume.safetensors", CONFIG_NAME)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is decided by; the flags of `experiments.evaluate` by the same names."""

    alg_name: str = "AlphaEdit"
    model_name: str = DEFAULT_MODEL
    hparams_fname: str | None = None
    ds_name: str = "starter"
    dataset_size_limit: int | None = 100
    num_edits: int = 20
    beta_hse: float = 0.5
    alpha: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    data_dir: str = "data"
    hparams_dir: str = "hparams"
    stats_dir: str = "data/stats"
    output_dir: str = "Edited_Weight"
    checkpoints: str = "ends"
    batch_tokens: int = 2048
    conserve_memory: bool = False
    use_cache: bool = False
    continue_from_run: bool = False
    overwrite: bool = False


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


def execute(config: RunConfig, command: str | None = None) -> Run:
    """Load, edit batch after batch, save.

    Args:
        command: the command line, kept with the configuration.

    Raises:
        SphereError: anything that the user can mend; checkpoints written so far are kept.
    """
    method = get_method(config.alg_name)
    if config.num_edits < 1:
        raise SphereError(
            f"--num_edits is the size of a batch and must be at least 1, got {config.num_edits}."
        )
    alpha = method.default_alpha if config.alpha is None else config.alpha
    label = model_label(config.model_name)
    hparams_path = Path(config.hparams_dir) / config.alg_name / (config.hparams_fname or f"{label}.json")
    hparams = load_hparams(hparams_path, method.hparams_class)
    method.rules(hparams, config.beta_hse, alpha)  # bad ratios are reported before anything is loaded
    records = load_records(config.ds_name, config.data_dir, config.dataset_size_limit)
    batches = [records[i : i + config.num_edits] for i in range(0, len(records), config.num_edits)]
    ends = _ends(batches)
    saved = saved_at(config.checkpoints, ends)
    folder = run_folder(
        config.output_dir, config.alg_name, label, config.ds_name, config.num_edits, config.beta_hse, alpha
    )
    _check_folder(folder, config)

    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config.model_name, config.device, config.dtype, config.device_map)
    log.info(
        "%s on %d records in %d batches of %d.", method.name, len(records), len(batches), config.num_edits
    )
    previous = read_config(folder) if config.continue_from_run else {}
    editor = Editor(
        model,
        tokenizer,
        config.alg_name,
        hparams,
        beta_hse=config.beta_hse,
        alpha=alpha,
        seed=config.seed,
        model_label=label,
        stats_dir=config.stats_dir,
        batch_tokens=config.batch_tokens,
        conserve_memory=config.conserve_memory,
        given_templates=previous.get("templates"),
    )
    decided = {
        "alg_name": config.alg_name,
        "hparams": hparams.to_dict(),
        "ds_name": config.ds_name,
        "case_ids": [r.case_id for r in records],
        "num_edits": config.num_edits,
        "beta_hse": config.beta_hse,
        "alpha": alpha,
        "seed": config.seed,
        "model": fingerprint(model),
        "model_dtype": str(model.dtype),
    }
    if previous:
        _check_same(previous, decided, folder)
    else:
        _clear(folder)
        description = _describe(config, command) | decided | {"templates": editor.workspace.templates}
        write_config(folder, description)
        write_checkpoint(folder, 0, editor.weights.stored())
    reports = _edit(editor, batches, folder, saved, resume=bool(previous))
    return Run(folder, model, tokenizer, editor, records, reports)


def _edit(
    editor: Editor, batches: Sequence[Sequence[Record]], folder: Path, saved: set[int], resume: bool
) -> list[BatchReport]:
    """The batches that are not yet done; after each one the log, the checkpoint and the resume point are written."""
    ends = _ends(batches)
    done = 0
    if resume and (point := read_resume(folder)):
        editor.load_state(*point)
        done = ends.index(editor.n_edits) + 1 if editor.n_edits else 0
        log.info("Continuing %s after %d edits.", folder, editor.n_edits)
    _truncate_log(folder, done)
    reports = []
    bar = tqdm(total=ends[-1], initial=editor.n_edits, desc=editor.method.name, unit="edit")
    for index in range(done, len(batches)):
        try:
            report = editor.edit([record.request for record in batches[index]])
        except SphereError as error:
            kept = (
                f"the state after {editor.n_edits} edits is kept in {folder}"
                if editor.n_edits
                else "nothing is lost"
            )
            raise SphereError(f"Batch {index + 1} of {len(batches)}: {error} ({kept}.)") from error
        reports.append(report)
        if report.n_edits in saved:
            write_checkpoint(folder, report.n_edits, editor.final_weights())
        _log_batch(folder, index, report)
        write_resume(folder, *editor.state())
        bar.update(report.n_edits - bar.n)
    bar.close()
    return reports


def saved_at(checkpoints: str, ends: Sequence[int]) -> set[int]:
    """Numbers of edits at which weights are saved: "ends" (first and last batch), "all", or a list "100,300".

    Args:
        ends: number of edits after each batch.

    Raises:
        SphereError: something else, or a number at which no batch ends.
    """
    if checkpoints == "all":
        return set(ends)
    result = {ends[0], ends[-1]}
    if checkpoints == "ends":
        return result
    try:
        wanted = {int(part) for part in checkpoints.split(",")}
    except ValueError:
        raise SphereError(
            f"--checkpoints is 'ends', 'all' or numbers of edits such as 100,300; got '{checkpoints}'."
        ) from None
    if strays := sorted(wanted - set(ends)):
        raise SphereError(
            f"--checkpoints names {strays}, but batches end at {', '.join(map(str, ends[:5]))}"
            f"{', ...' if len(ends) > 5 else ''}: give multiples of --num_edits."
        )
    return result | wanted


def _ends(batches: Sequence[Sequence[Record]]) -> list[int]:
    ends, total = [], 0
    for batch in batches:
        total += len(batch)
        ends.append(total)
    return ends


def _check_folder(folder: Path, config: RunConfig) -> None:
    """Never write over a run that the user did not give up."""
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


def _check_same(previous: dict[str, Any], decided: dict[str, Any], folder: Path) -> None:
    """A run goes on only as the run that it was."""
    different = [key for key, value in decided.items() if previous.get(key) != json.loads(json.dumps(value))]
    if different:
        raise SphereError(
            f"The run in {folder} was begun with other settings ({', '.join(different)}): continue it with the same "
            "ones, or begin anew with --overwrite."
        )


def _describe(config: RunConfig, command: str | None) -> dict[str, Any]:
    return {
        **asdict(config),
        "command": command or " ".join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _clear(folder: Path) -> None:
    """Remove what an earlier run of the same name left, its scores included."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            path.unlink()
    for name in ("summary", "rect_eval"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _log_batch(folder: Path, index: int, report: BatchReport) -> None:
    line = {"batch": index, **asdict(report)}
    with (folder / LOG_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _truncate_log(folder: Path, done: int) -> None:
    """Keep the lines of finished batches: a kill may have left a line whose resume point was never written."""
    path = folder / LOG_NAME
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)[:done]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), "utf-8")
