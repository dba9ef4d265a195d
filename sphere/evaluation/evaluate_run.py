"""Scoring a run: the unedited model and each checkpoint, on the edits made up to it.

    <folder>/summary/summary.json              one row per checkpoint (see `evaluate_run`)
    <folder>/summary/cases_edit_<n>.jsonl      a line with the key of what was scored, then one line per case
    <folder>/summary/state_edit_<n>.json       perplexity of the fixed text, and how far the weights have moved

A killed evaluation goes on where it stopped: finished cases are kept if the model as it stood, its dtype, the tokenizer
and the record are those that they were scored with (`sphere.evaluation.states`). Generated texts stand in the line of
their case; a case that was scored without them, or with another seed or other reference texts, is generated when that
is asked for, and not scored again.

Knows the order of things and the files. Scores are made by `sphere.evaluation.scoring` and
`sphere.evaluation.generation`, averages by `sphere.evaluation.summary`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import USER_TURN, list_checkpoints, read_config, undone_in
from sphere.data.records import Record
from sphere.distributed import Processes
from sphere.errors import SphereError
from sphere.evaluation.answer_metrics import AnswerOptions
from sphere.evaluation.case_file import CaseFile
from sphere.evaluation.exact_match import ExactMatch
from sphere.evaluation.generated_answers import GeneratedAnswers
from sphere.evaluation.generation import CaseGenerator
from sphere.evaluation.scored_facts import ScoredFacts, check_scored_facts
from sphere.evaluation.scoring import Case, RecordScorer, compare_predictions, count_prompts
from sphere.evaluation.state_metrics import StateMetrics
from sphere.evaluation.states import RunStates, State
from sphere.evaluation.summary import retention, summarise
from sphere.files import write_json
from sphere.forward.passes import PassOptions
from sphere.lock import locked
from sphere.values.context_templates import BARE

log = logging.getLogger(__name__)

FOLDER = "summary"
SUMMARY_NAME = "summary.json"
UNITS = (
    "percent; fluency in bits, perplexities, relative energy change and rotation in 1; intervals: percentile bootstrap "
    "over cases, 95 %"
)
CHUNK = 128  # records scored together and then written
GENERATED_CHUNK = 8  # cases whose texts are generated together and then written: 80 texts of CounterFact
CASES_FORMAT = 2  # 1: keyed by the edited weights alone; such cases are scored anew


def evaluate_run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    records: Sequence[Record],
    *,
    generation_interval: int = 0,
    exact_match_facts: int = 0,
    answers: AnswerOptions | None = None,
    only: Sequence[int] | None = None,
    scored_facts: int = 0,
    data_dir: str | Path = "data",
    dataset: Sequence[Record] | None = None,
    ds_name: str | None = None,
    notes: Mapping[str, str] | None = None,
    passes: PassOptions | None = None,
    seed: int = 0,
    unedited_dir: str | Path | None = None,
    progress: bool = True,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Score the unedited model and every checkpoint of a run; the model's weights are put back at the end.

    Prompts are put into the user's turn that the run edited with, where its run.json names one.

    Args:
        model: the unedited model that the run started from.
        folder: a run's folder, with `edit_<n>` files and (unless published .pth files) `run.json`.
        records: the dataset: in the order of editing, or containing the case_ids that `run.json` names.
        generation_interval: generate text for every so-many-th case in the order of editing, beginning with the
            first; 0 or below: never.
        exact_match_facts: generate greedy text after the rewrite prompts of so many cases, from the first.
        answers: which facts the model is asked about, as a user asks it (`sphere.evaluation.generated_answers`).
        only: numbers of edits of the checkpoints to be scored (default: all); the unedited model always is.
        scored_facts: score at most so many of the facts edited so far (`ScoredFacts`); 0: all.
        data_dir: where the reference texts of generation are, or are downloaded to.
        dataset: all records at hand, from which reference texts are built where none are published (default:
            `records`).
        ds_name: checked against the run's own, where both are known.
        notes: what the summary shall say of the records, by what it speaks of.
        passes: how forward passes are cut, and whether memory is saved.
        seed: of generation and of the bootstrap.
        unedited_dir: where finished cases of the unedited model are kept for other runs on the same facts.
        processes: among which the cases are shared out; the main one writes the files.

    Returns:
        The content of summary.json: see `_summary` and docs/formats/summary.md.

    Raises:
        SphereError: no checkpoints, checkpoints of another model, a dataset without the facts that were edited, or
            text asked for of a sample of the facts.
    """
    folder, processes, passes = Path(folder), processes or Processes(), passes or PassOptions()
    text = generation_interval > 0 or exact_match_facts or (answers and answers.facts)
    check_scored_facts(scored_facts, bool(text))
    list_checkpoints(folder)  # a wrong folder is reported before anything is locked
    with processes.together(), locked(folder, processes):
        edited = edited_records(
            records, list_checkpoints(folder)[-1].n_edits, read_config(folder), folder, ds_name
        )
        turn = read_config(folder).get(USER_TURN, BARE)
        states = RunStates(model, tokenizer, folder, only)
        generator = CaseGenerator(
            model,
            tokenizer,
            edited,
            dataset or records,
            interval=generation_interval,
            seed=seed,
            data_dir=data_dir,
            passes=passes,
            user_turn=turn,
            processes=processes,
        )
        scorer = RecordScorer(model, tokenizer, passes, turn)
        greedy = ExactMatch(model, tokenizer, edited, exact_match_facts, passes, turn)
        asked = GeneratedAnswers(model, tokenizer, edited, answers or AnswerOptions(), passes, turn)
        makers, own = (generator, greedy, asked), folder / FOLDER
        shared = Path(unedited_dir) if unedited_dir else None
        facts = ScoredFacts(edited, scored_facts, seed)
        scoring = _Scoring(scorer, makers, own, shared, progress, processes)
        metrics = StateMetrics(scorer.scorer, tokenizer, states, own, folder, processes)
        with states.temporarily(passes.offload_device), closing(asked):
            rows = _rows(scoring, facts, metrics, states, seed)
        summary = _summary(model, folder, states, makers, facts, rows, ds_name)
        summary["notes"] |= notes or {}
        processes.on_main(lambda: write_json(own / SUMMARY_NAME, summary))
    return summary


def _summary(
    model: Any,
    folder: Path,
    states: RunStates,
    makers: tuple[CaseGenerator, ExactMatch, GeneratedAnswers],
    facts: ScoredFacts,
    rows: Sequence[Mapping[str, Any]],
    ds_name: str | None,
) -> dict[str, Any]:
    """What summary.json holds.

    Returns:
        {"folder", "model", "dtype", "dataset", "seed", "generation_interval", "exact_match_facts", "generated_facts",
        "scored_facts", "judge", "units", "notes" (in
        words: what could not be verified of the model, which cases are generated, and where the texts they are compared
        with come from),
        "run" (its configuration), "checkpoints": one row each, the unedited model first: {"label", "checkpoint" (file
        name), "n_edits", "metrics" (`summarise`), "retention" (by thirds of the order of editing), "unedited" (the
        unedited model on the same cases), "text_perplexity" and "weights" (`StateMetrics.measure`)}}.
    """
    config, (generator, greedy, asked) = read_config(folder), makers
    return {
        "folder": str(folder),
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "dtype": str(model.dtype),
        "dataset": ds_name or config.get("ds_name"),
        "seed": generator.seed,
        "generation_interval": generator.interval,
        "exact_match_facts": greedy.count,
        "generated_facts": asked.options.facts,
        "scored_facts": facts.limit,
        "judge": asked.options.judge,
        "units": UNITS,
        "notes": ({"model": states.note} if states.note else {})
        | generator.notes
        | greedy.notes
        | asked.notes
        | _undone(states),
        "run": {key: value for key, value in config.items() if key != "case_ids"},
        "checkpoints": rows,
    }


def _undone(states: RunStates) -> dict[str, str]:
    """A note on edits that a checkpoint is without, though they count in its scores."""
    if not states.checkpoints:
        return {}
    last = states.checkpoints[-1]
    undone = len(undone_in(last.path))
    note = f"{undone} of {last.n_edits} edits are undone in {last.path.name}; they count in its scores."
    return {"undone": note} if undone else {}


def edited_records(
    records: Sequence[Record],
    n_edits: int,
    config: Mapping[str, Any],
    folder: str | Path = "",
    ds_name: str | None = None,
) -> list[Record]:
    """The records of the first `n_edits` edits of a run, in the order of editing.

    Raises:
        SphereError: there are no edits, or the dataset is another one or shorter than their number.
    """
    if not n_edits:
        raise SphereError(f"The run in {folder} has no edits yet, only the original weights: edit first.")
    if ds_name and config.get("ds_name", ds_name) != ds_name:
        raise SphereError(
            f"The run in {folder} edited the dataset '{config['ds_name']}', not '{ds_name}': give that one.",
            argument="ds_name",
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
            f"{len(records)} records): give all records of the dataset that was edited.",
            argument=("dataset_size_limit", "ds_name"),
        )
    return found


def _rows(
    scoring: _Scoring, facts: ScoredFacts, metrics: StateMetrics, states: RunStates, seed: int
) -> list[dict[str, Any]]:
    """The summary's rows: the unedited model, then each checkpoint; the model is left with the last one's weights."""
    rows: list[dict[str, Any]] = []
    unedited: dict[int, Case] = {}  # by case_id
    counts = [checkpoint.n_edits for checkpoint in states.checkpoints] or [len(facts.records)]
    for state in states:
        cases = scoring.cases(state, facts.of(state.n_edits) if state.checkpoint else facts.of_any(counts))
        unedited = unedited or {case["case_id"]: case for case in cases}
        compare_predictions(cases, list(unedited.values()))
        rows.append(
            {
                "label": state.label if state.checkpoint else "unedited",
                "checkpoint": state.checkpoint.path.name if state.checkpoint else None,
                "n_edits": state.n_edits,
                "metrics": summarise(cases, seed),
                "retention": retention(cases, seed),
                "unedited": summarise([unedited[case["case_id"]] for case in cases], seed),
                **metrics.measure(state),
            }
        )
    return rows


class _TextMaker(Protocol):
    """What generates text for some of the cases, to stand under `key` in each."""

    key: str

    def wants(self, record: Record) -> bool: ...
    def settings(self, record: Record) -> str: ...
    def generate(self, records: Sequence[Record]) -> list[dict[str, Any]]: ...


class _Scoring:
    """Scores of one run's states, kept on disk as they are made."""

    def __init__(
        self,
        scorer: RecordScorer,
        makers: Sequence[_TextMaker],
        folder: Path,
        unedited_dir: Path | None,
        progress: bool,
        processes: Processes,
    ) -> None:
        self.scorer, self.makers, self.folder, self.unedited_dir = scorer, makers, folder, unedited_dir
        self.progress, self.processes = progress and processes.main, processes

    def cases(self, state: State, records: Sequence[Record]) -> list[Case]:
        """Cases of the model as it stands: those on disk, and the others, scored and put there."""
        name = state.checkpoint.path.name if state.checkpoint else "unedited"
        header = {"format": CASES_FORMAT, **state.key}
        if self.scorer.user_turn != BARE:
            header[USER_TURN] = self.scorer.user_turn
        file = CaseFile(self.folder / f"cases_{state.label}.jsonl", header, self.processes)
        shared: Path | None = None
        if self.unedited_dir and not state.checkpoint:
            shared = self.unedited_dir / f"cases_{file.digest(records)}.jsonl"
            file.take(shared)
        # Whole chunks, always cut alike: rounding depends on what shares a batch, and a restart should not show.
        chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
        todo = [chunk for chunk in chunks if any(file.get(record) is None for record in chunk)]
        file.forget([record for chunk in todo for record in chunk])
        file.write(records, self._asked_for)
        if todo:
            self._score(todo, file, name)
        made = [self._generate(maker, records, file, name) for maker in self.makers]
        if todo or any(made):
            file.write(records, self._asked_for)  # one line per case again
        if shared:
            file.write_to(shared, records)
        log.info("%s: %d cases, %d of them scored now", file.path, len(records), sum(map(len, todo)))
        return [self._asked_for(record, file[record]) for record in records]

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

    def _generate(self, maker: _TextMaker, records: Sequence[Record], file: CaseFile, name: str) -> bool:
        """Texts of the cases that should have some and lack them; whole chunks, as in `cases`. Whether any did."""
        wanted = [record for record in records if maker.wants(record)]
        chunks = [wanted[i : i + GENERATED_CHUNK] for i in range(0, len(wanted), GENERATED_CHUNK)]
        todo = [c for c in chunks if any(maker.key not in self._asked_for(r, file[r]) for r in c)]
        if not todo:
            return False
        start = time.perf_counter()
        with tqdm(
            total=sum(map(len, todo)), desc=f"{name}, {maker.key}", unit="case", disable=not self.progress
        ) as bar:
            for chunk in self._rounds(todo):
                made = self._shared(maker.generate, chunk)
                scored = [file[record] for record in chunk]
                file.append(chunk, [case | {maker.key: new} for case, new in zip(scored, made, strict=True)])
                bar.update(len(chunk))
        seconds = time.perf_counter() - start
        cases = sum(map(len, todo))
        log.info("%s: %s text of %d cases in %.1f s", name, maker.key, cases, seconds)
        return True

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

    def _asked_for(self, record: Record, case: Case) -> Case:
        """A finished case, without text that was generated for other settings or that nobody wants now."""
        case = dict(case)
        for maker in self.makers:
            made_with = case.get(maker.key, {}).get("settings")
            if not (maker.wants(record) and made_with == maker.settings(record)):
                case.pop(maker.key, None)
        return case
