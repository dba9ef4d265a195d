"""Downstream tasks on the unedited model and every checkpoint of a run.

    <folder>/rect_eval/edit_<n>/<task>.jsonl     one line per example: prompt, output, prediction, correct
    <folder>/rect_eval/edit_<n>/state.json       digest of the checkpoint that these lines were made with
    <folder>/rect_eval/edit_<n>/lm_eval/<task>.json
    <folder>/rect_eval/summary.json              metrics, keyed by checkpoint

Finished examples are not decoded again, unless the checkpoint or their prompt has changed. Knows nothing of how the
run was edited.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import Checkpoint, list_checkpoints, read_weights
from sphere.distributed import Processes
from sphere.downstream import harness
from sphere.downstream.decoding import greedy_batches
from sphere.downstream.metrics import summarise
from sphere.downstream.tasks import Example, Task, choose
from sphere.files import atomic_path, read_json, write_json
from sphere.forward.passes import PassOptions
from sphere.lock import locked
from sphere.weights import EditedWeights

log = logging.getLogger(__name__)

FOLDER = "rect_eval"
SUMMARY = "summary.json"
BLOCK = 64  # examples that each of several processes decodes before they are gathered and written


def run_downstream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    data_dir: str | Path,
    num_tests: int | None = None,
    tasks: list[str] | None = None,
    lm_eval_tasks: Sequence[str] | None = None,
    passes: PassOptions | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Score the unedited model and every checkpoint in `folder`; the model is left as it was.

    Args:
        model: the unedited model that the run started from.
        folder: a run's folder with `edit_<n>` files.
        data_dir: holds `task-data`.
        num_tests: only the first so many examples of each task; None for all.
        tasks: names of `sphere.downstream.TASKS`; None for all four.
        lm_eval_tasks: tasks for lm-evaluation-harness, beside the four (see `sphere.downstream.harness`).
        passes: how forward passes are cut, and whether memory is saved.
        processes: among which the examples are shared out (lm-evaluation-harness runs in the main one); the main one
            writes the files.

    Returns:
        The summary as written to `rect_eval/summary.json`:
        {"checkpoints": {"edit_<n>": {"n_edits", "tasks": {name: metrics}, "lm_eval": {name: metrics}}}, ...}.

    Raises:
        SphereError: no checkpoints, checkpoints of another model, missing task data, lm-eval not installed.
    """
    folder, processes, passes = Path(folder), processes or Processes(), passes or PassOptions()
    list_checkpoints(folder)  # a wrong folder is reported first
    chosen = choose(tasks)
    examples = {task.name: task.examples(data_dir, num_tests) for task in chosen}
    evaluator = harness.Harness(lm_eval_tasks, data_dir, num_tests, passes) if lm_eval_tasks else None
    with locked(folder, processes):
        return _score_states(
            model, tokenizer, folder, examples, chosen, evaluator, num_tests, passes, processes
        )


def _score_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    examples: dict[str, list[Example]],
    chosen: list[Task],
    evaluator: harness.Harness | None,
    num_tests: int | None,
    passes: PassOptions,
    processes: Processes,
) -> dict[str, Any]:
    """The summary of a run whose folder no other process is at; written anew after every task."""
    results = folder / FOLDER
    summary = processes.on_main(lambda: _old_summary(results / SUMMARY)) | {
        "model": model.config.name_or_path or type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_tests": num_tests,
    }

    def write() -> None:
        if processes.main:
            write_json(results / SUMMARY, summary)

    for checkpoint in _states(model, list_checkpoints(folder), passes.offload_device):
        name = f"edit_{checkpoint.n_edits}"
        place = results / name
        processes.on_main(partial(_forget_if_changed, place, checkpoint.path))
        entry = summary["checkpoints"].setdefault(name, {})
        entry["n_edits"] = checkpoint.n_edits
        scores = entry.setdefault("tasks", {})
        for task in chosen:
            path = place / f"{task.name}.jsonl"
            records = _decode(model, tokenizer, task, examples[task.name], path, passes, processes)
            scores[task.name] = summarise(records, task.positive)
            write()
        if evaluator:
            run = partial(evaluator.run, model, tokenizer, place / "lm_eval")
            entry.setdefault("lm_eval", {}).update(processes.on_main(run))
            write()
    return summary


def _states(
    model: PreTrainedModel, checkpoints: list[Checkpoint], device: str | None
) -> Iterator[Checkpoint]:
    """Put the model into each state in turn, the unedited one first, and back at the end.

    Args:
        device: where the original weights are kept meanwhile; None: where they are.
    """
    names = list(read_weights(checkpoints[0].path))
    weights = EditedWeights(model, names)
    with weights.temporarily(device):
        if checkpoints[0].n_edits != 0:  # a run without its original weights: the model itself has them
            yield Checkpoint(Path(), 0)
        for checkpoint in checkpoints:
            weights.restore(read_weights(checkpoint.path))
            yield checkpoint


def _old_summary(path: Path) -> dict[str, Any]:
    old = read_json(path, "downstream summary") if path.exists() else {}
    return {**old, "checkpoints": dict(old.get("checkpoints", {}))}


def _forget_if_changed(place: Path, checkpoint: Path) -> None:
    """Remove results that were made with other weights under the same name."""
    state = {"sha256": _digest(checkpoint) if checkpoint.name else None}
    path = place / "state.json"
    if path.exists() and read_json(path, "state of the downstream results") != state:
        log.warning("%s has changed since it was scored: scoring it again.", checkpoint)
        shutil.rmtree(place)
    write_json(path, state)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: list[Example],
    path: Path,
    passes: PassOptions,
    processes: Processes,
) -> list[dict[str, Any]]:
    """Graded records of all examples, in order; missing ones are decoded and saved batch by batch."""
    records = processes.on_main(lambda: _read_records(path))
    wanted = {example.index: example for example in examples}
    for example in examples:  # grading is cheap and may have been mended: only outputs are kept
        old = records.get(example.index)
        if old is not None and old["prompt"] != example.prompt:
            del records[example.index]
        elif old is not None:
            records[example.index] = _record(task, example, old["output"])
    missing = [example for example in examples if example.index not in records]
    label = f"{path.parent.name} {task.name}"
    done = len(examples) - len(missing)
    bar = tqdm(total=len(examples), initial=done, desc=label, unit="ex", disable=not processes.main)

    def decode(prompts: list[str]) -> Iterator[list[tuple[int, str]]]:
        return greedy_batches(model, tokenizer, prompts, task.max_new_tokens, passes)

    batches = _shared(decode, [e.prompt for e in missing], processes)
    with bar if missing else nullcontext():
        for batch in batches:
            for position, output in batch:
                example = missing[position]
                records[example.index] = _record(task, example, output)
            if processes.main:
                _write_records(path, records)
            bar.update(len(batch))
    return [records[index] for index in sorted(wanted)]


def _shared(
    decode: Callable[[list[str]], Iterator[list[tuple[int, str]]]], prompts: list[str], processes: Processes
) -> Iterator[list[tuple[int, str]]]:
    """Batches of (index of the prompt, continuation), each process decoding its share, longest prompts first."""
    if processes.size == 1:
        yield from decode(prompts)
        return

    def share(chosen: Sequence[int]) -> list[tuple[int, str]]:
        return [(chosen[i], text) for batch in decode([prompts[i] for i in chosen]) for i, text in batch]

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    block = BLOCK * processes.size
    for start in range(0, len(order), block):
        yield [pair for part in processes.shares(share, order[start : start + block]) for pair in part]


def _record(task: Task, example: Example, output: str) -> dict[str, Any]:
    return {
        "index": example.index,
        "prompt": example.prompt,
        "answers": list(example.answers),
        "output": output,
        **task.grade(output, example.answers),
    }


def _read_records(path: Path) -> dict[int, dict[str, Any]]:
    """Records by example index; none where there is no file."""
    if not path.exists():
        return {}
    records = {}
    for line in path.read_text("utf-8").split("\n"):
        try:
            record = json.loads(line)
            records[int(record["index"])] = {"prompt": record["prompt"], "output": record["output"], **record}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue  # not a record: decoded again
    return records


def _write_records(path: Path, records: dict[int, dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index in sorted(records):
            file.write(json.dumps(records[index], ensure_ascii=False) + "\n")
