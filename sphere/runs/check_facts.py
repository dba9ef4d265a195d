"""What `sphere check` says of a table of facts: how each row will be read, and what is wrong with which.

Knows the tokenizer; loads the model only where it is asked what it knows already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sphere.data.facts import BadRow, Facts, read_facts, repeated
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.forward.packing import Scored
from sphere.forward.scorer import PackedScorer
from sphere.models import load_model, load_tokenizer
from sphere.runs.facts_file import read_subjects
from sphere.values.tokenization import encode, encode_pair, subject_token


@dataclass(frozen=True)
class FactsReport:
    """What was found.

    Attributes:
        lines: to print.
        bad: rows that cannot be used.
        repeated: sentences on facts that repeat or contradict others.
        known: case_ids whose new target the model says already; empty where it was not asked.
    """

    lines: list[str]
    bad: list[BadRow]
    repeated: list[str]
    known: list[int]


def check_facts(
    source: str,
    subjects: str | None = None,
    model_name: str | None = None,
    *,
    known: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    shown: int | None = 20,
) -> FactsReport:
    """Read a table of facts as editing would.

    Args:
        source: a file, or "-".
        subjects: a file with a subject on each line.
        model_name: whose tokenizer cuts prompts into tokens; None: none does, and rows are shown as text.
        known: load the model, too, and find the facts that it says already.
        shown: how many rows are shown; None: all.

    Raises:
        SphereError: the table or the model cannot be read.
    """
    facts = read_facts(source, read_subjects(subjects) if subjects else ())
    model, tokenizer = None, None
    if known and model_name:
        model, tokenizer = load_model(model_name, device, dtype)
    elif model_name:
        tokenizer = load_tokenizer(model_name)
    good, bad = _readable(facts, tokenizer)
    told = repeated(facts)
    said = _known(model, tokenizer, good) if model is not None and tokenizer is not None else []
    lines = [_shown(record, facts, tokenizer) for record in good[:shown]]
    if shown is not None and len(good) > shown:
        lines.append(f"... and {len(good) - shown} more")
    lines += ["", *facts.notes]
    lines += [f"Row {one.number} cannot be used: {one.reason.rstrip('.')}." for one in bad]
    lines += told
    lines += [f"Row {facts.numbers[case_id]} is known already." for case_id in said]
    lines.append(f"{len(good)} facts can be edited, {len(bad)} rows cannot.")
    return FactsReport(lines, bad, told, said)


def _readable(facts: Facts, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[Record], list[BadRow]]:
    """The records whose subject and target the tokenizer finds, and all bad rows in the table's order."""
    good, bad = [], list(facts.bad)
    for record in facts.records:
        try:
            if tokenizer is not None:
                _tokens(record, tokenizer)
        except SphereError as error:
            bad.append(BadRow(facts.numbers[record.case_id], str(error)))
        else:
            good.append(record)
    return good, sorted(bad, key=lambda one: one.number)


def _tokens(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int, int]:
    """Token ids of prompt and target, the index of the subject's last token, and that of the target's first."""
    request = record.request
    ids, start = encode_pair(tokenizer, request.text, request.target_new, request.joiner)
    lookup = subject_token(encode(tokenizer, request.text), request.subject_end, f"case {record.case_id}")
    return ids, lookup, start


def _shown(record: Record, facts: Facts, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A row as it will be read: "   3  The mother tongue of Danielle Dar[rieux] is  =>  | English"."""
    request, number = record.request, facts.numbers[record.case_id]
    if tokenizer is None:
        return (
            f"{number:>6}  {request.prompt.replace('{}', f'[{request.subject}]')}  =>  {request.target_new}"
        )
    ids, lookup, start = _tokens(record, tokenizer)
    parts = (ids[:lookup], [ids[lookup]], ids[lookup + 1 : start])
    before, at, behind = (str(tokenizer.decode(part)) for part in parts)
    target = "|".join(str(tokenizer.decode([token])) for token in ids[start:])
    return f"{number:>6}  {before}[{at}]{behind}  =>  {target}"


def _known(model: object, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> list[int]:
    """case_ids of the facts each of whose target tokens is the likeliest one already."""
    sequences = {}
    for record in records:
        ids, _, start = _tokens(record, tokenizer)
        sequences[record.case_id] = Scored(tuple(ids), start)
    scores = PackedScorer(model).score(list(dict.fromkeys(sequences.values())))
    return [case_id for case_id, scored in sequences.items() if all(scores[scored].hits(scored))]
