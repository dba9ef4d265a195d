"""Records, and the formats of the first two datasets: CounterFact (cf, mcf) and zsRE as MEND published it.

Other benchmarks are read in `sphere.data.benchmarks`.

Whatever is wrong with a record is said when it is read, with its key: missing, of another type, blank, no text that can
be encoded, or contradictory. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sphere.data.fields import get_joiner, get_text, get_texts, get_value, optional_text
from sphere.data.subjects import with_place
from sphere.errors import SphereError
from sphere.requests import EditRequest

Kind = Literal["counterfact", "zsre"]


@dataclass(frozen=True)
class Question:
    """A prompt with its answers.

    Attributes:
        answers: the first one is scored token by token; the others are other names of it. Empty: the model should go on
            to answer as it did before the edit.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """One of a benchmark's further tests of an edit, beside rewrite, paraphrase and neighborhood prompts.

    Attributes:
        metric: what the benchmark's authors call it.
        questions: the test is passed where one of them is answered.
        every: it is passed where all of them are.
        conditions: what the unedited model must know for the test to count.
    """

    metric: str
    questions: tuple[Question, ...]
    every: bool = False
    conditions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Record:
    """One fact to edit, and what is asked of the model about it.

    Attributes:
        case_id: the record's number in its dataset.
        request: the edit itself: prompt, subject, new and (CounterFact) true target.
        kind: "counterfact" compares two targets; "zsre" asks for one answer, token by token, of zsRE and of most
            other benchmarks.
        relation_id: Wikidata property, where published.
        paraphrase_prompts: complete prompts that should show the new target too.
        neighborhood: (prompt, its answer). The answer is None for CounterFact, where it is the true target.
        attribute_prompts: complete prompts about subjects that really have the new target.
        generation_prompts: openings for free generation.
        target_new_id: Wikidata entity of the new target, where published.
        probes: the benchmark's further tests. Where a case has several edits, the last one has them.
        group: the same for all edits of one published case, which are made one after the other; None: it has one.
    """

    case_id: int
    request: EditRequest
    kind: Kind = "counterfact"
    relation_id: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood: tuple[tuple[str, str | None], ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    target_new_id: str | None = None
    # No part of what finished cases are known by, so that those of earlier versions are; see `case_file`.
    probes: tuple[Probe, ...] = field(default=(), repr=False)
    group: int | None = field(default=None, repr=False)


def read_record(kind: Kind, index: int, entry: object) -> Record:
    """The record that an object of a dataset's file stands for.

    Args:
        index: its place in the file, from 0.

    Raises:
        SphereError: it is not sound; the sentence names the key.
    """
    if not isinstance(entry, dict):
        raise SphereError(f"it is a {type(entry).__name__}, not an object with keys")
    return _zsre(entry, index) if kind == "zsre" else _counterfact(entry)


def _counterfact(entry: Mapping[str, Any]) -> Record:
    """CounterFact (Meng et al. 2022, ROME, arXiv 2202.05262); mcf is the part of it that MEMIT uses."""
    case_id = get_value(entry, "case_id", int)
    rewrite = get_value(entry, "requested_rewrite", dict, list)
    if isinstance(rewrite, list):
        if len(rewrite) != 1 or not isinstance(rewrite[0], dict):
            raise SphereError("'requested_rewrite' should be one object, or a list of one")
        rewrite = rewrite[0]
    prompt, subject = get_text(rewrite, "prompt"), get_text(rewrite, "subject")
    if "{}" not in prompt:
        raise SphereError(f"'prompt' has no '{{}}' for the subject: {prompt!r}")
    new, true = get_value(rewrite, "target_new", dict), get_value(rewrite, "target_true", dict)
    request = EditRequest(
        case_id,
        prompt,
        subject,
        get_text(new, "str", "target_new.str"),
        get_text(true, "str", "target_true.str"),
        get_joiner(entry),
    )
    return Record(
        case_id,
        request,
        "counterfact",
        relation_id=optional_text(rewrite, "relation_id"),
        paraphrase_prompts=get_texts(entry, "paraphrase_prompts"),
        neighborhood=tuple((prompt, None) for prompt in get_texts(entry, "neighborhood_prompts")),
        attribute_prompts=get_texts(entry, "attribute_prompts", optional=True),
        generation_prompts=get_texts(entry, "generation_prompts", optional=True),
        target_new_id=optional_text(new, "id", "target_new.id"),
    )


def _zsre(entry: Mapping[str, Any], index: int) -> Record:
    """zsRE as MEND published it (Mitchell et al. 2022, arXiv 2110.11309), read as MEMIT does.

    The new target is the first true answer (`answers`), not the distractor `alt`; the neighbor is an
    unrelated question of Natural Questions, asked with a question mark.
    """
    subject, question = get_text(entry, "subject"), get_text(entry, "src")
    answers = get_texts(entry, "answers")
    if not answers:
        raise SphereError("'answers' should be a list of at least one text")
    template = _template(question, subject)
    request = EditRequest(index, template, subject, answers[0], joiner=get_joiner(entry))
    unrelated = get_text(entry, "loc")
    if not unrelated.startswith("nq question: "):
        raise SphereError(f"'loc' should begin with 'nq question: ', got {unrelated!r}")
    return Record(
        index,
        request,
        "zsre",
        paraphrase_prompts=(get_text(entry, "rephrase"),),
        neighborhood=((unrelated + "?", get_text(entry, "loc_ans")),),
    )


def _template(question: str, subject: str) -> str:
    """Put `{}` in the subject's place: its first occurrence as whole words, else as part of one."""
    template = with_place(question, subject)
    if template is None:
        raise SphereError(f"its subject {subject!r} is not in 'src': {question!r}")
    return template
