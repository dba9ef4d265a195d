"""Downstream tasks on the unedited model and every checkpoint of a run.

    <folder>/rect_eval/edit_<n>/<task>.jsonl     one line per example: key, prompt, output, prediction, correct
    <folder>/rect_eval/edit_<n>/lm_eval/<task>.json
    <folder>/rect_eval/summary.json              metrics, keyed by checkpoint

Finished examples are not decoded again, unless their prompt or anything else that made them has changed
(`sphere.evaluation.states`). Knows nothing of how the run was edited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.checkpoints import list_checkpoints
from sphere.distributed import Processes
from sphere.downstream import harness
from sphere.downstream.decoding import greedy_batches
from sphere.downstream.likelihoods import answer_likelihoods
from sphere.downstream.published import PUBLISHED
from sphere.downstream.tasks import TASKS, Example, Task
from sphere.errors import SphereError
from sphere.evaluation.states import RunStates, State
from sphere.files import atomic_path, read_json, write_json
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer
from sphere.lock import locked

FOLDER = "rect_eval"
SUMMARY = "summary.json"
TASK_FORMATS = {"ours": TASKS, "published": PUBLISHED}
Said = dict[str, Any]  # of one prompt: see `_record`
BLOCK = 64  # examples that each of several processes decodes before they are gathered and written


def run_downstream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    data_dir: str | Path,
    num_tests: int | None = None,
    tasks: list[str] | None = None,
    lm_eval_tasks: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
    passes: PassOptions | None = None,
    processes: Processes | None = None,
    task_format: str = "ours",
) -> dict[str, Any]:
    """Score the unedited model and every checkpoint in `folder`; the model is left as it was.

    Args:
        model: the unedited model that the run started from.
        folder: a run's folder with `edit_<n>` files.
        data_dir: holds `task-data`.
        num_tests: only the first so many examples of each task; None for all.
        tasks: names of `sphere.downstream.TASKS`; None for all four.
        lm_eval_tasks: tasks for lm-evaluation-harness, beside the four (see `sphere.downstream.harness`).
        only: numbers of edits of the states to be scored, 0 for the unedited model (default: all).
        passes: how forward passes are cut, and whether memory is saved.
        processes: among which the examples are shared out (lm-evaluation-harness runs in the main one); the main one
            writes the files.
        task_format: "ours", or "published": the form in which the paper's authors score the tasks.

    Returns:
        The summary as written to `rect_eval/summary.json`:
        {"checkpoints": {"edit_<n>": {"n_edits", "key", "tasks": {name: metrics}, "lm_eval": {name: metrics}}}, "notes"
        (what could not be verified of the model), ...}.

    Raises:
        SphereError: no checkpoints, checkpoints of another model, missing task data, lm-eval not installed.
    """
    folder, processes, passes = Path(folder), processes or Processes(), passes or PassOptions()
    list_checkpoints(folder)  # a wrong folder is reported first
    chosen = choose(tasks, task_format)
    examples = {task.name: task.examples(data_dir, num_tests) for task in chosen}
    evaluator = harness.Harness(lm_eval_tasks, data_dir, num_tests, passes) if lm_eval_tasks else None
    with locked(folder, processes):
        states = RunStates(model, tokenizer, folder, only)
        scoring = _Scoring(model, tokenizer, folder / FOLDER, passes, processes, num_tests)
        with states.temporarily(passes.offload_device):
            asked = (state for state in states if only is None or state.n_edits in only)
            return scoring.score(states, asked, [(task, examples[task.name]) for task in chosen], evaluator)


def choose(names: Sequence[str] | None, task_format: str = "ours") -> list[Task]:
    """The tasks of these names in one of `TASK_FORMATS`, all for None.

    Raises:
        SphereError: an unknown name or format.
    """
    if task_format not in TASK_FORMATS:
        raise SphereError(
            f"Unknown form of the downstream tasks '{task_format}': use {' or '.join(TASK_FORMATS)}.",
            argument="task_format",
        )
    known = TASK_FORMATS[task_format]
    for name in names or ():
        if name not in known:
            raise SphereError(f"Unknown downstream task '{name}': use {', '.join(known)}.", argument="tasks")
    return [task for name, task in known.items() if names is None or name in names]


class _Scoring:
    """Downstream scores of one run's states, kept on disk as they are made."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        passes: PassOptions,
        processes: Processes,
        num_tests: int | None,
    ) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.passes, self.processes, self.num_tests = passes, processes, num_tests
        self.scorer = PackedScorer(model, passes)

    def score(
        self,
        states: RunStates,
        asked: Iterable[State],
        tasks: Sequence[tuple[Task, list[Example]]],
        evaluator: harness.Harness | None,
    ) -> dict[str, Any]:
        """The summary, of the states asked for and those scored before; written anew after every task."""
        summary = self._begin(states)
        for state in asked:
            entry = summary["checkpoints"].setdefault(state.label, {})
            if entry.get("key") != state.digest():  # other weights under the same name
                entry.clear()
                entry |= {"n_edits": state.n_edits, "key": state.digest(), "tasks": {}}
            for task, examples in tasks:
                entry["tasks"][task.name] = task.scores(self._decode(state, task, examples))
                self._write(summary)
            if evaluator:
                run = partial(
                    evaluator.run, self.model, self.tokenizer, self.folder / state.label / "lm_eval", state
                )
                entry.setdefault("lm_eval", {}).update(self.processes.on_main(run))
                self._write(summary)
        return summary

    def _begin(self, states: RunStates) -> dict[str, Any]:
        """The summary that is there, if it is of this model in this dtype, with what is known now."""
        path = self.folder / SUMMARY
        old = self.processes.on_main(lambda: read_json(path, "downstream summary") if path.exists() else {})
        same = old.get("key") == states.unedited.digest()
        return {
            "model": self.model.config.name_or_path or type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "num_tests": self.num_tests,
            "notes": {"model": states.note} if states.note else {},
            "key": states.unedited.digest(),
            "checkpoints": dict(old["checkpoints"]) if same else {},
        }

    def _write(self, summary: dict[str, Any]) -> None:
        if self.processes.main:
            write_json(self.folder / SUMMARY, summary)

    def _decode(self, state: State, task: Task, examples: list[Example]) -> list[dict[str, Any]]:
        """Graded records of all examples, in order; missing ones are decoded and saved batch by batch."""
        path = self.folder / state.label / f"{task.name}.jsonl"
        key = state.digest(task=task.name, max_new_tokens=task.max_new_tokens)
        records = self.processes.on_main(lambda: _read_records(path, key))
        for example in examples:  # grading is cheap and may have been corrected: only outputs are kept
            old = records.get(example.index)
            if old is not None and old["prompt"] != example.prompt:
                del records[example.index]
            elif old is not None:
                records[example.index] = _record(key, task, example, old)
        missing = [example for example in examples if example.index not in records]
        bar = tqdm(
            total=len(examples),
            initial=len(examples) - len(missing),
            desc=f"{state.label} {task.name}",
            unit="ex",
            disable=not self.processes.main,
        )

        def decode(prompts: list[str]) -> Iterator[list[tuple[int, Said]]]:
            for batch in greedy_batches(
                self.model, self.tokenizer, prompts, task.max_new_tokens, self.passes
            ):
                choices = self._choices(task, [prompts[i] for i, _ in batch])
                yield [(i, {"output": text} | own) for (i, text), own in zip(batch, choices, strict=True)]

        with bar if missing else nullcontext():
            for batch in _shared(decode, [e.prompt for e in missing], self.processes):
                for position, said in batch:
                    example = missing[position]
                    records[example.index] = _record(key, task, example, said)
                if self.processes.main:
                    _write_records(path, records)
                bar.update(len(batch))
        return [records[example.index] for example in sorted(examples, key=lambda example: example.index)]

    def _choices(self, task: Task, prompts: list[str]) -> list[Said]:
        """How likely each of the task's choices is after each prompt: mean log-likelihood of its tokens."""
        if not task.choices:
            return [{} for _ in prompts]
        names, words = zip(*task.choices, strict=True)
        found = answer_likelihoods(self.scorer, self.tokenizer, prompts, words)
        return [{"log_likelihoods": dict(zip(names, values, strict=True))} for values in found]


def _shared(
    decode: Callable[[list[str]], Iterator[list[tuple[int, Said]]]], prompts: list[str], processes: Processes
) -> Iterator[list[tuple[int, Said]]]:
    """Batches of (index of the prompt, continuation), each process decoding its share, longest prompts first."""
    if processes.size == 1:
        yield from decode(prompts)
        return

    def share(chosen: Sequence[int]) -> list[tuple[int, Said]]:
        return [(chosen[i], said) for batch in decode([prompts[i] for i in chosen]) for i, said in batch]

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    block = BLOCK * processes.size
    for start in range(0, len(order), block):
        yield [pair for part in processes.shares(share, order[start : start + block]) for pair in part]


def _record(key: str, task: Task, example: Example, said: Said) -> dict[str, Any]:
    """A line of the task's file; `said` holds "output", and "log_likelihoods" of the task's choices."""
    output = said["output"]
    choices = said["log_likelihoods"] if task.choices else None
    return {
        "key": key,
        "index": example.index,
        "prompt": example.prompt,
        "answers": list(example.answers),
        "output": output,
        **task.grade(output, example.answers),
        **({"log_likelihoods": choices, "choice": max(choices, key=choices.__getitem__)} if choices else {}),
    }


def _read_records(path: Path, key: str) -> dict[int, dict[str, Any]]:
    """Records by example index, of those that were made with this key; none where there is no file."""
    if not path.exists():
        return {}
    records = {}
    for line in path.read_text("utf-8").split("\n"):
        try:
            record = json.loads(line)
            if record["key"] == key:
                records[int(record["index"])] = {
                    "prompt": record["prompt"],
                    "output": record["output"],
                    **record,
                }
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue  # not a record: decoded again
    return records


def _write_records(path: Path, records: dict[int, dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index in sorted(records):
            file.write(json.dumps(records[index], ensure_ascii=False) + "\n")
