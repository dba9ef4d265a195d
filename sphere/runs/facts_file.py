"""Anyone's facts in a run: read before it begins, completed by the unedited model, kept in its folder.

    <folder>/facts.json    {"format", "source", "notes", "skipped": [{"row", "reason"}], "records": the facts as edited}

The folder then holds all that scoring needs, whatever becomes of the user's table. A run that is continued takes the
answers that the unedited model gave at its beginning from there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sphere.data.controls import control_prompts
from sphere.data.facts import BadRow, Facts, read_facts, repeated
from sphere.data.formats import Probe, Question
from sphere.data.records import Record, load_records
from sphere.errors import SphereError
from sphere.evaluation.unedited_answers import complete
from sphere.files import read_json, write_json
from sphere.forward.passes import PassOptions
from sphere.methods import get_method
from sphere.requests import EditRequest
from sphere.runs.config import RunConfig
from sphere.runs.folder import FACTS_NAME

log = logging.getLogger(__name__)

FORMAT = 1
SHOWN = 5  # bad rows that one error names


def load_facts(
    source: str,
    subjects: str | None,
    on_bad_record: str,
    limit: int | None = None,
    *,
    subject_needed: bool = True,
) -> Facts:
    """The facts of a user's table, or of the part of it that can be used.

    Args:
        source: a file, or "-".
        subjects: a file with a subject on each line, or None.
        on_bad_record: "stop" refuses a table with bad rows, "skip" leaves them out, with a warning.
        limit: use only the first so many good rows.
        subject_needed: whether a row without a subject is bad, or stands for its subject with all of its prompt.

    Raises:
        SphereError: an unreadable table, bad rows, or no good one.
    """
    names = read_subjects(subjects) if subjects else ()
    facts = read_facts(source, names, subject_needed=subject_needed)
    for sentence in [*facts.notes, *repeated(facts)]:
        log.info("%s: %s", source, sentence)
    if facts.bad and on_bad_record == "stop":
        shown = "; ".join(f"row {bad.number}: {bad.reason.rstrip('.')}" for bad in facts.bad[:SHOWN])
        raise SphereError(
            f"{len(facts.bad)} of {len(facts.bad) + len(facts.records)} rows of {source} cannot be used ({shown}): "
            "correct them, see all with `sphere check`, or skip them.",
            argument=("facts", "on_bad_record"),
        )
    for bad in facts.bad:
        log.warning("%s: row %d is skipped: %s", source, bad.number, bad.reason)
    if not facts.records:
        raise SphereError(f"{source} holds no fact that can be used.", argument="facts")
    used = facts.records[:limit]
    log.info("%s: %d of %d facts, %d rows skipped", source, len(used), len(facts.records), len(facts.bad))
    return dataclasses.replace(facts, records=used)


def read_subjects(path: str | Path) -> list[str]:
    """Names of subjects, one on each line.

    Raises:
        SphereError: no such file, or no UTF-8 text.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SphereError(
            f"Cannot read the list of subjects {path}: {error}.", argument="subjects"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def own_facts(config: RunConfig) -> Facts | None:
    """The table of facts that a run edits; None where it edits a dataset."""
    if config.facts is None:
        return None
    return load_facts(
        config.facts,
        config.subjects,
        config.on_bad_record,
        config.dataset_size_limit,
        subject_needed=get_method(config.alg_name).uses_subject,
    )


def records_of(config: RunConfig, facts: Facts | None) -> list[Record]:
    """What a run edits, in the order of its file: the user's facts where there are some, else those of its dataset.

    Raises:
        SphereError: no such dataset, or records that cannot be used.
    """
    return (
        facts.records if facts else load_records(config.ds_name, config.data_dir, config.dataset_size_limit)
    )


def n_edits_of(config: RunConfig) -> int:
    """How many facts a run edits, counted in its table or in the file of its dataset.

    Raises:
        SphereError: as `own_facts` and `records_of`.
    """
    return len(records_of(config, own_facts(config)))


def complete_facts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    continued: Path | None,
    passes: PassOptions,
    user_turn: str,
) -> tuple[list[Record], dict[str, str]]:
    """Facts with what they leave open, and notes on it: as a continued run began with, else of the unedited model.

    Args:
        continued: the folder of the run that is continued; None for a new one, whose model may be another than that of
            a run which it replaces.
        user_turn: what prompts are put into when the model is asked.
    """
    kept = _kept(continued) if continued else None
    if kept is not None:
        by_id = {record.case_id: record for record in kept["records"]}
        if all(_fits(record, by_id.get(record.case_id)) for record in facts.records):
            return [by_id[record.case_id] for record in facts.records], kept["notes"]
    return complete(model, tokenizer, facts.records, control_prompts(), passes, user_turn)


def write_facts(
    folder: Path, source: str, facts: Facts, records: Sequence[Record], notes: Mapping[str, str]
) -> None:
    """Keep the facts of a run in its folder, atomically; what is kept there already stays."""
    if not (folder / FACTS_NAME).exists():
        write_all_facts(folder, source, records, notes, facts.bad)


def write_all_facts(
    folder: Path,
    source: str,
    records: Sequence[Record],
    notes: Mapping[str, str],
    bad: Sequence[BadRow],
) -> None:
    """Write a run's facts.json, in the place of one that is there, atomically."""
    content = {
        "format": FORMAT,
        "source": source,
        "notes": dict(notes),
        "skipped": [{"row": one.number, "reason": one.reason} for one in bad],
        "records": [_to_json(record) for record in records],
    }
    write_json(folder / FACTS_NAME, content)


def read_run_facts(folder: str | Path) -> tuple[list[Record], dict[str, str]]:
    """The facts that a run edited, complete, and what its summary shall say of them.

    Raises:
        SphereError: the folder holds none.
    """
    kept = _kept(Path(folder))
    if kept is None:
        raise SphereError(
            f"{folder} holds no {FACTS_NAME}: it is no run of a table of facts, or it was cut off as it began.",
            argument="ds_name",
        )
    notes = dict(kept["notes"])
    if kept["skipped"]:
        notes["skipped"] = f"{len(kept['skipped'])} rows of the table were skipped: see {FACTS_NAME}."
    return kept["records"], notes


def _kept(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's facts.json with its records; None where there is none."""
    path = folder / FACTS_NAME
    if not path.exists():
        return None
    content = read_json(path, "facts of the run")
    try:
        if content["format"] != FORMAT:
            raise SphereError(
                f"{path} is of format {content['format']}, this version reads {FORMAT}: update it."
            )
        return {**content, "records": [_from_json(entry) for entry in content["records"]]}
    except (KeyError, TypeError) as error:
        raise SphereError(f"{path} is not what a run writes ({error!r}): restore it.") from error


def _fits(record: Record, kept: Record | None) -> bool:
    """Whether a kept record is this one, with its open answers filled in."""
    if kept is None:
        return False
    request = record.request
    if request.target_true is None:
        request = dataclasses.replace(request, target_true=kept.request.target_true)
    neighborhood = kept.neighborhood
    if record.neighborhood and len(neighborhood) == len(record.neighborhood):
        neighborhood = tuple(
            (prompt, known if answer is None else answer)
            for (prompt, answer), (_, known) in zip(record.neighborhood, neighborhood, strict=True)
        )
    return dataclasses.replace(record, request=request, neighborhood=neighborhood) == kept


def _to_json(record: Record) -> dict[str, Any]:
    request = dataclasses.asdict(record.request)
    of_a_dataset = {"kind": record.kind, "generation_prompts": list(record.generation_prompts)}
    return {
        **request,
        "paraphrases": list(record.paraphrase_prompts),
        "neighborhood": [list(pair) for pair in record.neighborhood],
        **(of_a_dataset if record.kind != "counterfact" or record.generation_prompts else {}),
        **({"probes": [dataclasses.asdict(probe) for probe in record.probes]} if record.probes else {}),
        **({"group": record.group} if record.group is not None else {}),
    }


def _from_json(entry: Mapping[str, Any]) -> Record:
    names = [field.name for field in dataclasses.fields(EditRequest)]
    return Record(
        entry["case_id"],
        EditRequest(**{name: entry[name] for name in names if name in entry}),
        entry.get("kind", "counterfact"),
        paraphrase_prompts=tuple(entry["paraphrases"]),
        neighborhood=tuple((prompt, answer) for prompt, answer in entry["neighborhood"]),
        generation_prompts=tuple(entry.get("generation_prompts", ())),
        probes=tuple(_probe(probe) for probe in entry.get("probes", ())),
        group=entry.get("group"),
    )


def _probe(entry: Mapping[str, Any]) -> Probe:
    asked = {
        name: tuple(Question(one["prompt"], tuple(one["answers"])) for one in entry[name])
        for name in ("questions", "conditions")
    }
    return Probe(entry["metric"], asked["questions"], entry["every"], asked["conditions"])
