"""Scoring a run: the unedited model and each checkpoint, on the edits made up to it.

    <folder>/summary/summary.json              one row per checkpoint (see `evaluate_run`)
    <folder>/summary/cases_edit_<n>.jsonl      a line that says what was scored, then one line per case

A killed evaluation goes on where it stopped: finished cases are kept if the weights, the record and the settings
are those that they were scored with. Generated texts stand in the line of their case; a case that was scored without
them, or with another seed or other reference texts, is generated when that is asked for, and not scored again.

Knows the order of things and the files. Scores are made by `sphere.evaluation.scoring` and
`sphere.evaluation.generation`, averages by `sphere.evaluation.summary`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import Checkpoint, list_checkpoints, read_config, read_weights
from sphere.data.records import Record
from sphere.distributed import Processes
from sphere.errors import SphereError
from sphere.evaluation.generation import CaseGenerator
from sphere.evaluation.scoring import Case, RecordScorer, compare_predictions, count_prompts
from sphere.evaluation.summary import retention, summarise
from sphere.files import atomic_path, write_json
from sphere.forward.passes import PassOptions
from sphere.lock import locked
from sphere.weights import EditedWeights

log = logging.getLogger(__name__)

FOLDER = "summary"
SUMMARY_NAME = "summary.json"
CHUNK = 128  # records scored together and then written
GENERATED_CHUNK = 8  # cases whose texts are generated together and then written: 80 texts of CounterFact
SAME_WEIGHTS = 1e-2  # relative: the original weights in bfloat16 against float32 differ by less
CASES_FORMAT = 1


def evaluate_run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    records: Sequence[Record],
    *,
    generation_interval: int = 0,
    data_dir: str | Path = "data",
    dataset: Sequence[Record] | None = None,
    ds_name: str | None = None,
    passes: PassOptions | None = None,
    seed: int = 0,
    progress: bool = True,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Score the unedited model and every checkpoint of a run; the model's weights are put back at the end.

    Args:
        model: the unedited model that the run started from.
        folder: a run's folder, with `edit_<n>` files and (unless published .pth files) `run.json`.
        records: the dataset: in the order of editing, or containing the case_ids that `run.json` names.
        generation_interval: generate text for every so-many-th case in the order of editing, beginning with the
            first; 0 or below: never.
        data_dir: where the reference texts of generation are, or are downloaded to.
        dataset: all records at hand, from which reference texts are built where none are published (default:
            `records`).
        ds_name: checked against the run's own, where both are known.
        passes: how forward passes are cut, and whether memory is saved.
        seed: of generation and of the bootstrap.
        processes: among which the cases are shared out; the main one writes the files.

    Returns:
        The content of summary.json: {"folder", "model", "seed", "units", "notes" (in words: which cases are
        generated, and where the texts they are compared with come from), "run" (its configuration), "checkpoints":
        one row each, edit_0 first: {"label", "checkpoint" (file name), "n_edits", "metrics" (`summarise`),
        "retention" (by thirds of the order of editing), "unedited" (the unedited model on the same cases)}}.

    Raises:
        SphereError: no checkpoints, checkpoints of another model, or a dataset without the facts that were edited.
    """
    folder, processes, passes = Path(folder), processes or Processes(), passes or PassOptions()
    checkpoints = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.n_edits]
    if not checkpoints:
        raise SphereError(f"The run in {folder} has no edits yet, only the original weights: edit first.")
    config = read_config(folder)
    edited = edited_records(records, checkpoints[-1].n_edits, config, folder, ds_name)
    weights = _original_weights(model, folder)
    generator = CaseGenerator(
        model,
        tokenizer,
        edited,
        dataset or records,
        interval=generation_interval,
        seed=seed,
        data_dir=data_dir,
        passes=passes,
        processes=processes,
    )
    run = _Scoring(model, tokenizer, edited, folder, passes, generator, progress, processes)
    offload = passes.offload_device
    with processes.together(), locked(folder, processes), weights.temporarily(offload):
        rows = _rows(run, weights, checkpoints, seed)
        summary = {
            "folder": str(folder),
            "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
            "dtype": str(model.dtype),
            "dataset": ds_name or config.get("ds_name"),
            "seed": seed,
            "generation_interval": max(generation_interval, 0),
            "units": "percent; fluency in bits, perplexity in 1; intervals: percentile bootstrap over cases, 95 %",
            "notes": generator.notes,
            "run": {key: value for key, value in config.items() if key != "case_ids"},
            "checkpoints": rows,
        }
        processes.on_main(lambda: write_json(folder / FOLDER / SUMMARY_NAME, summary))
    return summary


def edited_records(
    records: Sequence[Record],
    n_edits: int,
    config: Mapping[str, Any],
    folder: str | Path = "",
    ds_name: str | None = None,
) -> list[Record]:
    """The records of the first `n_edits` edits of a run, in the order of editing.

    Raises:
        SphereError: the dataset is another one, or shorter than the number of edits.
    """
    if ds_name and config.get("ds_name", ds_name) != ds_name:
        raise SphereError(
            f"The run in {folder} edited the dataset '{config['ds_name']}', not '{ds_name}': "
            f"give --ds_name={config['ds_name']}."
        )
    case_ids = config.get("case_ids")
    if case_ids is None:
        found = list(records[:n_edits])
    else:
        by_id = {record.case_id: record for record in records}
        found = [by_id[i] for i in case_ids[:n_edits] if i in by_id]
    if len(found) < n_edits:
        raise SphereError(
            f"The run in {folder} made {n_edits} edits, of which the dataset holds only {len(found)} (it has "
            f"{len(records)} records): raise --dataset_size_limit or give the dataset that was edited."
        )
    return found


def _original_weights(model: Any, folder: Path) -> EditedWeights:
    """The weights that the run edits; the model must be the one that the run started from."""
    first = list_checkpoints(folder)[0]
    saved = read_weights(first.path)
    other = (
        f"The checkpoint {first.path} is of another model than {type(model).__name__} "
        f"'{getattr(model.config, 'name_or_path', '')}'"
    )
    try:
        weights = EditedWeights(model, list(saved))
    except SphereError as error:
        raise SphereError(
            f"{other} ({str(error).split(':')[0]}): give --model_name the run's own."
        ) from error
    for name, own in weights.stored().items():
        if saved[name].shape != own.shape:
            raise SphereError(
                f"{other} ('{name}' has shape {tuple(saved[name].shape)} there, {tuple(own.shape)} here): "
                "give --model_name the run's own."
            )
        if first.n_edits == 0:
            distance = float((saved[name].float() - own.float()).norm() / own.float().norm())
            if not distance <= SAME_WEIGHTS:
                raise SphereError(
                    f"{other} ('{name}' differs by {100 * distance:.1f} % before any edit): give --model_name the "
                    "unedited model that the run started from."
                )
    return weights


def _load(weights: EditedWeights, checkpoint: Checkpoint) -> None:
    saved = read_weights(checkpoint.path)
    try:
        weights.restore(saved)
    except SphereError as error:
        raise SphereError(f"Checkpoint {checkpoint.path}: {error}") from error


def _rows(
    run: _Scoring, weights: EditedWeights, checkpoints: Sequence[Checkpoint], seed: int
) -> list[dict[str, Any]]:
    """The summary's rows: the unedited model, then each checkpoint; the model is left with the last one's weights."""
    unedited = run.cases(weights, 0, None)
    compare_predictions(unedited, unedited)
    rows = [_row("unedited", None, 0, unedited, unedited, seed)]
    for checkpoint in checkpoints:
        _load(weights, checkpoint)
        n_edits = checkpoint.n_edits
        cases = run.cases(weights, n_edits, checkpoint)
        compare_predictions(cases, unedited)
        rows.append(_row(f"edit_{n_edits}", checkpoint, n_edits, cases, unedited, seed))
    return rows


def _row(
    label: str,
    checkpoint: Checkpoint | None,
    n_edits: int,
    cases: Sequence[Case],
    unedited: Sequence[Case],
    seed: int,
) -> dict[str, Any]:
    return {
        "label": label,
        "checkpoint": checkpoint.path.name if checkpoint else None,
        "n_edits": n_edits,
        "metrics": summarise(cases, seed),
        "retention": retention(cases, seed),
        "unedited": summarise(unedited[: len(cases)], seed),
    }


class _Scoring:
    """Scores of one run's states, kept on disk as they are made."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        folder: Path,
        passes: PassOptions,
        generator: CaseGenerator,
        progress: bool,
        processes: Processes,
    ) -> None:
        self.model, self.processes = model, processes
        self.records = records
        self.folder = folder / FOLDER
        self.scorer = RecordScorer(model, tokenizer, passes)
        self.generator = generator
        self.progress = progress and processes.main

    def cases(self, weights: EditedWeights, n_edits: int, checkpoint: Checkpoint | None) -> list[Case]:
        """Cases of the model as it stands: those on disk, and the others, scored and put there."""
        records = self.records[: n_edits or None]
        name = checkpoint.path.name if checkpoint else "unedited"
        header = {
            "format": CASES_FORMAT,
            "checkpoint": name,
            "fingerprint": self._fingerprint(weights),
        }
        file = CaseFile(self.folder / f"cases_edit_{n_edits}.jsonl", header, self.processes)
        # Whole chunks, always cut alike: rounding depends on what shares a batch, and a restart should not show.
        chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
        todo = [chunk for chunk in chunks if any(file.get(record) is None for record in chunk)]
        file.begin([record for chunk in chunks if chunk not in todo for record in chunk])
        if todo:
            self._score(todo, file, name)
        self._generate(records, file, name)
        log.info("%s: %d cases, %d of them scored now", file.path, len(records), sum(map(len, todo)))
        return [self._asked_for(record, file) for record in records]

    def _score(self, chunks: Sequence[Sequence[Record]], file: CaseFile, name: str) -> None:
        start, prompts = time.perf_counter(), 0
        with tqdm(total=sum(map(len, chunks)), desc=name, unit="case", disable=not self.progress) as bar:
            for chunk in self._rounds(chunks):
                cases = self._shared(lambda own: self.scorer.score(own, progress=False), chunk)
                file.append(chunk, cases)
                prompts += count_prompts(cases)
                bar.update(len(chunk))
        seconds = time.perf_counter() - start
        log.info("%s: %d prompts in %.1f s, %.1f prompts/s", name, prompts, seconds, prompts / seconds)

    def _generate(self, records: Sequence[Record], file: CaseFile, name: str) -> None:
        """Texts of the cases that should have some and lack them; whole chunks, as in `cases`."""
        wanted = [record for record in records if self.generator.wants(record)]
        chunks = [wanted[i : i + GENERATED_CHUNK] for i in range(0, len(wanted), GENERATED_CHUNK)]
        todo = [c for c in chunks if any("generation" not in self._asked_for(r, file) for r in c)]
        if not todo:
            return
        start, texts = time.perf_counter(), 0
        with tqdm(
            total=sum(map(len, todo)), desc=f"{name}, text", unit="case", disable=not self.progress
        ) as bar:
            for chunk in self._rounds(todo):
                made = self._shared(self.generator.generate, chunk)
                scored = [_present(file.get(record)) for record in chunk]
                file.append(
                    chunk, [case | {"generation": new} for case, new in zip(scored, made, strict=True)]
                )
                texts += sum(len(new["texts"]) for new in made)
                bar.update(len(chunk))
        file.begin(records)  # one line per case again
        seconds = time.perf_counter() - start
        log.info("%s: %d texts generated in %.1f s, %.2f texts/s", name, texts, seconds, texts / seconds)

    def _rounds(self, chunks: Sequence[Sequence[Record]]) -> Iterator[list[Record]]:
        """As many chunks at a time as there are processes: each gets one, where all are full."""
        size = self.processes.size
        for i in range(0, len(chunks), size):
            yield [record for chunk in chunks[i : i + size] for record in chunk]

    def _shared(
        self, make: Callable[[Sequence[Record]], list[Case]], records: Sequence[Record]
    ) -> list[Case]:
        """What `make` makes of records, one result each, shared out to the processes."""
        return [case for part in self.processes.shares(make, records) for case in part]

    def _asked_for(self, record: Record, file: CaseFile) -> Case:
        """The finished case, without text that was generated for other settings or that nobody wants now."""
        case = _present(file.get(record))
        made_with = case.get("generation", {}).get("settings")
        if self.generator.wants(record) and made_with == self.generator.settings(record):
            return case
        return {key: value for key, value in case.items() if key != "generation"}

    def _fingerprint(self, weights: EditedWeights) -> str:
        """Of the edited weights as they stand, and of the kind of model around them."""
        digest = hashlib.sha256(f"{type(self.model).__name__} {self.model.num_parameters()}".encode())
        for name, tensor in sorted(weights.stored().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _present(case: Case | None) -> Case:
    assert case is not None
    return case


class CaseFile:
    """One JSON line per finished case, after a header line; only complete lines that fit are trusted.

    Args:
        header: says which weights; a file with another header is begun anew.
        processes: the main one reads and writes the file, all of them know its cases.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], processes: Processes | None = None) -> None:
        self.path = path
        self.header = header
        self.processes = processes or Processes()
        self._cases: dict[tuple[int, str], Case] = {}
        for line in self.processes.on_main(lambda: self._trusted(path, header)):
            self._cases[line["case"]["case_id"], line["record"]] = line["case"]

    def begin(self, kept: Sequence[Record]) -> None:
        """Write the file anew with the finished cases of `kept` only."""
        self._cases = {(r.case_id, _digest(r)): _present(self.get(r)) for r in kept}
        if not self.processes.main:
            return
        lines = [json.dumps(self.header), *(_line(digest, c) for (_, digest), c in self._cases.items())]
        with atomic_path(self.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", "utf-8")

    @staticmethod
    def _trusted(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        lines = []
        for text in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is incomplete
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        if not lines or lines[0] != header:
            return []
        return [line for line in lines[1:] if {"record", "case"} <= line.keys()]

    def get(self, record: Record) -> Case | None:
        """The finished case of exactly this record."""
        return self._cases.get((record.case_id, _digest(record)))

    def append(self, records: Sequence[Record], cases: Sequence[Case]) -> None:
        """Add finished cases, at once on disk."""
        added = {(r.case_id, _digest(r)): case for r, case in zip(records, cases, strict=True)}
        self._cases |= added
        if not self.processes.main:
            return
        with self.path.open("a", encoding="utf-8") as out:
            out.write("".join(_line(digest, case) + "\n" for (_, digest), case in added.items()))


def _line(digest: str, case: Case) -> str:
    return json.dumps({"record": digest, "case": case}, ensure_ascii=False, allow_nan=False)


def _digest(record: Record) -> str:
    """Changes with anything in the record."""
    return hashlib.sha256(repr(record).encode()).hexdigest()[:16]
