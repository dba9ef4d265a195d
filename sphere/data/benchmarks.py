"""Benchmarks of knowledge editing in the shapes that their authors published, one reader each.

    MQuAKE-CF         Zhong et al. 2023, arXiv 2305.14795      multi-hop questions on one or several edits
    RippleEdits       Cohen et al. 2024, arXiv 2307.12976      six criteria
    WikiBigEdit       Thede et al. 2025, arXiv 2503.05683      personas, multi-hop, locality
    UltraEditBench    Gu et al. 2025, arXiv 2505.14679         generalization, specificity
    KnowEdit          Zhang et al. 2024, arXiv 2401.01286      portability, locality
    HalluEditBench    Huang et al. 2025, arXiv 2410.16251      generalization, portability, locality

What a benchmark asks beside rewrite, paraphrase and neighborhood prompts becomes a `Probe` under its authors' name for
it. An edit is made at its subject's last token: a record without a subject that stands in its prompt cannot be edited,
and `NoSubject` says so.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

from sphere.data.fields import get_list, get_objects, get_text, get_texts, get_value, optional_text
from sphere.data.formats import Probe, Question, Record
from sphere.data.subjects import SubjectFinder, with_place
from sphere.errors import SphereError
from sphere.requests import EditRequest

Entry = Mapping[str, Any]
Reader = Callable[[Entry, int, SubjectFinder], list[Record]]

RIPPLE_CRITERIA = (
    "Logical_Generalization",
    "Compositionality_I",
    "Compositionality_II",
    "Subject_Aliasing",
    "Forgetfulness",
    "Relation_Specificity",
)
HOPS = range(2, 7)


class NoSubject(SphereError):
    """A record that cannot be edited, as no subject stands in its prompt."""


def read_benchmark(name: str, index: int, entry: object, finder: SubjectFinder) -> list[Record]:
    """The facts to edit of one case of a benchmark, one after the other; one fact, but for MQuAKE.

    Args:
        name: one of `READERS`.
        index: the case's place in its file, from 0.
        finder: looks for the subjects that a record does not name.

    Returns:
        records, whose case_ids are `index`; MQuAKE's are left to the loader to number.

    Raises:
        NoSubject: it has no subject to edit at.
        SphereError: it is not sound; the sentence names the key.
    """
    if not isinstance(entry, Mapping):
        raise SphereError(f"it is a {type(entry).__name__}, not an object with keys")
    return READERS[name](entry, index, finder)


def _mquake(entry: Entry, index: int, finder: SubjectFinder) -> list[Record]:
    """Every edit of the case, then, with the last one, its multi-hop questions and the single hops of the new chain."""
    rewrites = get_value(entry, "requested_rewrite", list)
    if not rewrites or not all(isinstance(rewrite, dict) for rewrite in rewrites):
        raise SphereError("'requested_rewrite' should be a list of at least one object")
    group = get_value(entry, "case_id", int)
    records = []
    for rewrite in rewrites:
        prompt, subject = get_text(rewrite, "prompt"), get_text(rewrite, "subject")
        new, true = get_value(rewrite, "target_new", dict), get_value(rewrite, "target_true", dict)
        request = EditRequest(
            index,
            _template(prompt, subject),
            subject,
            get_text(new, "str", "target_new.str"),
            get_text(true, "str", "target_true.str"),
        )
        question = optional_text(rewrite, "question")
        records.append(
            Record(
                index,
                request,
                relation_id=optional_text(rewrite, "relation_id"),
                paraphrase_prompts=(question,) if question else (),
                group=group,
            )
        )
    answers = (get_text(entry, "new_answer"), *get_texts(entry, "new_answer_alias", optional=True))
    asked = tuple(Question(prompt, answers) for prompt in get_texts(entry, "questions"))
    hops = tuple(
        Question(
            get_text(hop, "cloze"), (get_text(hop, "answer"), *get_texts(hop, "answer_alias", optional=True))
        )
        for hop in get_objects(entry, "new_single_hops")
    )
    probes = [Probe("multi_hop", asked)] if asked else []
    probes += [Probe("instance_wise", hops, every=True)] if hops else []
    records[-1] = replace(records[-1], probes=tuple(probes))
    return records


def _ripple(entry: Entry, index: int, finder: SubjectFinder) -> list[Record]:
    """The edit's sentence names subject and object by their ids only: the texts are found in it."""
    edit = get_value(entry, "edit", dict)
    sentence = get_text(edit, "prompt", "edit.prompt").strip().removesuffix(".")
    tests = {name: _ripple_probes(entry, name) for name in RIPPLE_CRITERIA}
    prompt, target = _split(sentence, edit, (probe for probes in tests.values() for probe in probes))
    request = _request(index, prompt, optional_text(edit, "subject"), target, finder)
    return [Record(index, request, "zsre", probes=tuple(p for probes in tests.values() for p in probes))]


def _ripple_probes(entry: Entry, name: str) -> list[Probe]:
    probes = []
    for test in get_objects(entry, name):
        questions = tuple(_ripple_questions(test, "test_queries"))
        if questions:
            every = test.get("test_condition", "OR") == "AND"
            probes.append(Probe(name, questions, every, tuple(_ripple_questions(test, "condition_queries"))))
    return probes


def _ripple_questions(test: Entry, key: str) -> Iterator[Question]:
    """Queries with answers; those whose answer nobody knows are left out, as their authors do."""
    for query in get_objects(test, key):
        answers = [
            text
            for answer in get_objects(query, "answers")
            for text in (answer.get("value"), *get_list(answer, "aliases"))
            if isinstance(text, str) and text.strip()
        ]
        if answers:
            yield Question(get_text(query, "prompt"), tuple(answers))


def _split(sentence: str, edit: Entry, probes: Iterable[Probe]) -> tuple[str, str]:
    """Prompt and new object of a sentence: the longest answer of a test that ends it, else what the sentence of the
    replaced fact has otherwise.
    """
    answers = {answer for probe in probes for question in probe.questions for answer in question.answers}
    ends = [answer for answer in answers if sentence.endswith(" " + answer)]
    if ends:
        target = max(ends, key=len)
        return sentence[: -len(target)].rstrip(), target
    original = edit.get("original_fact")
    if isinstance(original, dict):
        other = get_text(original, "prompt", "original_fact.prompt").strip().removesuffix(".")
        words = zip(sentence.split(" "), other.split(" "), strict=False)
        prompt = " ".join(word for word, _ in takewhile(lambda pair: pair[0] == pair[1], words))
        if prompt and (target := sentence[len(prompt) :].strip()):
            return prompt, target
    raise NoSubject(f"what it edits cannot be told in {sentence!r}: no test's answer ends it")


def _wiki_big_edit(entry: Entry, index: int, finder: SubjectFinder) -> list[Record]:
    answer = get_text(entry, "ans")
    request = _request(index, get_text(entry, "update"), optional_text(entry, "subject"), answer, finder)
    probes = [*_asked("personas", entry.get("personas"), answer)]
    probes += _asked("multi_hop", entry.get("mhop"), entry.get("mhop_ans"))
    return [_one_answer(entry, request, "rephrase", probes)]


def _ultra_edit_bench(entry: Entry, index: int, finder: SubjectFinder) -> list[Record]:
    request = _request(
        index, get_text(entry, "prompt"), optional_text(entry, "subject"), get_text(entry, "ans"), finder
    )
    return [_one_answer(entry, request, "rephrase_prompt", [])]


def _know_edit(entry: Entry, index: int, finder: SubjectFinder) -> list[Record]:
    subject = optional_text(entry, "subject") or optional_text(entry, "concept")
    prompt = optional_text(entry, "prompt") or get_text(entry, "text")
    target = next(iter(_answers(entry.get("target_new") or entry.get("labels"))), None)
    if target is None:
        raise SphereError("the key 'target_new' is missing")
    request = _request(index, prompt, subject, target, finder)
    probes = [
        probe
        for part in ("portability", "locality")
        if entry.get(part)
        for name in get_value(entry, part, dict)
        for test in get_objects(entry[part], name)
        for probe in _asked(f"{part}_{name}", test.get("prompt"), test.get("ground_truth"))
    ]
    return [_one_answer(entry, request, "rephrase_prompt", probes)]


def _hallu_edit_bench(entry: Entry, index: int, finder: SubjectFinder) -> list[Record]:
    """A row of its CSV. Locality is to answer as before; robustness is asked in further turns, which no column has."""
    subject, target = get_text(entry, "subject"), get_text(entry, "object")
    question = get_text(entry, "question")
    request = _request(index, question, subject, target, finder)
    # An empty cell holds nothing.
    entry = {name: cell for name, cell in entry.items() if not isinstance(cell, str) or cell.strip()}
    choices = entry.get("multiple_choice_with_letters")
    probes = [
        *_asked("generalization_yes", entry.get("yes_question"), "Yes"),
        *_asked("generalization_no", entry.get("no_question"), "No"),
        *_asked(
            "generalization_multiple_choice",
            f"{question} {choices}" if choices else None,
            entry.get("multiple_choice_labels"),
        ),
        *_asked("generalization_reversed_relation", entry.get("reversed_relation_question"), subject),
    ]
    for n in HOPS:
        probes += _asked(f"portability_{n}hop", entry.get(f"question_{n}hop"), entry.get(f"answer_{n}hop"))
    if unrelated := optional_text(entry, "locality_question"):
        probes.append(Probe("locality", (Question(unrelated, ()),)))
    return [_one_answer(entry, request, "paraphrased_question", probes)]


READERS: dict[str, Reader] = {
    "mquake_cf": _mquake,
    "ripple_recent": _ripple,
    "ripple_random": _ripple,
    "ripple_popular": _ripple,
    "wiki_big_edit": _wiki_big_edit,
    "ultra_edit_bench": _ultra_edit_bench,
    "knowedit_recent": _know_edit,
    "knowedit_counterfact": _know_edit,
    "hallu_edit_bench": _hallu_edit_bench,
}


def _one_answer(entry: Entry, request: EditRequest, rephrased: str, probes: Iterable[Probe]) -> Record:
    """A record that asks for one answer, with its paraphrase and its unrelated question where it has them."""
    paraphrase, unrelated = optional_text(entry, rephrased), optional_text(entry, "loc")
    answer = next(iter(_answers(entry.get("loc_ans"))), None)
    return Record(
        request.case_id,
        request,
        "zsre",
        paraphrase_prompts=(paraphrase,) if paraphrase else (),
        neighborhood=((unrelated, answer),) if unrelated and answer else (),
        probes=tuple(probes),
    )


def _asked(metric: str, prompt: object, answers: object) -> list[Probe]:
    """A probe of one question; none where the record has no prompt or no answer."""
    texts = _answers(answers)
    if not isinstance(prompt, str) or not prompt.strip() or not texts:
        return []
    return [Probe(metric, (Question(prompt, texts),))]


def _answers(value: object) -> tuple[str, ...]:
    """The texts of an answer, a list of its names or a list of such lists."""
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(text for part in value for text in _answers(part)))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a year
    return (value,) if isinstance(value, str) and value.strip() else ()


def _request(
    case_id: int, prompt: str, subject: str | None, target: str, finder: SubjectFinder
) -> EditRequest:
    subject = subject or finder.find(prompt)
    if subject is None:
        raise NoSubject(f"no subject is named, and none is plain in {prompt!r}")
    return EditRequest(case_id, _template(prompt, subject), subject, target)


def _template(prompt: str, subject: str) -> str:
    if prompt.count("{}") == 1:
        return prompt
    template = with_place(prompt, subject)
    if template is None or template.count("{}") != 1:
        raise NoSubject(f"its subject {subject!r} is not in {prompt!r}")
    return template
