"""Records, and the published formats that they are read from: CounterFact (cf, mcf) and zsRE as MEND published it.

Whatever is wrong with a record is said when it is read, with its key: missing, of another type, blank, no text that can
be encoded, or contradictory. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sphere.data.subjects import with_place
from sphere.errors import SphereError
from sphere.requests import EditRequest, check_text

Kind = Literal["counterfact", "zsre"]


@dataclass(frozen=True)
class Record:
    """One fact to edit, and what is asked of the model about it.

    Attributes:
        case_id: the record's number in its dataset.
        request: the edit itself: prompt, subject, new and (CounterFact) true target.
        kind: "counterfact" compares two targets; "zsre" asks for one answer, token by token.
        relation_id: Wikidata property, where published.
        paraphrase_prompts: complete prompts that should show the new target too.
        neighborhood: (prompt, its answer). The answer is None for CounterFact, where it is the true target.
        attribute_prompts: complete prompts about subjects that really have the new target.
        generation_prompts: openings for free generation.
        target_new_id: Wikidata entity of the new target, where published.
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
    case_id = _get(entry, "case_id", int)
    rewrite = _get(entry, "requested_rewrite", dict, list)
    if isinstance(rewrite, list):
        if len(rewrite) != 1 or not isinstance(rewrite[0], dict):
            raise SphereError("'requested_rewrite' should be one object, or a list of one")
        rewrite = rewrite[0]
    prompt, subject = _text(rewrite, "prompt"), _text(rewrite, "subject")
    if "{}" not in prompt:
        raise SphereError(f"'prompt' has no '{{}}' for the subject: {prompt!r}")
    new, true = _get(rewrite, "target_new", dict), _get(rewrite, "target_true", dict)
    request = EditRequest(
        case_id,
        prompt,
        subject,
        _text(new, "str", "target_new.str"),
        _text(true, "str", "target_true.str"),
        _joiner(entry),
    )
    return Record(
        case_id,
        request,
        "counterfact",
        relation_id=_optional_text(rewrite, "relation_id"),
        paraphrase_prompts=_texts(entry, "paraphrase_prompts"),
        neighborhood=tuple((prompt, None) for prompt in _texts(entry, "neighborhood_prompts")),
        attribute_prompts=_texts(entry, "attribute_prompts", optional=True),
        generation_prompts=_texts(entry, "generation_prompts", optional=True),
        target_new_id=_optional_text(new, "id", "target_new.id"),
    )


def _zsre(entry: Mapping[str, Any], index: int) -> Record:
    """zsRE as MEND published it (Mitchell et al. 2022, arXiv 2110.11309), read as MEMIT does.

    The new target is the first true answer (`answers`), not the distractor `alt`; the neighbor is an
    unrelated question of Natural Questions, asked with a question mark.
    """
    subject, question = _text(entry, "subject"), _text(entry, "src")
    answers = _texts(entry, "answers")
    if not answers:
        raise SphereError("'answers' should be a list of at least one text")
    template = _template(question, subject)
    request = EditRequest(index, template, subject, answers[0], joiner=_joiner(entry))
    unrelated = _text(entry, "loc")
    if not unrelated.startswith("nq question: "):
        raise SphereError(f"'loc' should begin with 'nq question: ', got {unrelated!r}")
    return Record(
        index,
        request,
        "zsre",
        paraphrase_prompts=(_text(entry, "rephrase"),),
        neighborhood=((unrelated + "?", _text(entry, "loc_ans")),),
    )


def _template(question: str, subject: str) -> str:
    """Put `{}` in the subject's place: its first occurrence as whole words, else as part of one."""
    template = with_place(question, subject)
    if template is None:
        raise SphereError(f"its subject {subject!r} is not in 'src': {question!r}")
    return template


def _get(entry: Mapping[str, Any], key: str, *kinds: type, name: str | None = None) -> Any:
    """The value of a key; `name` is what an error calls it, where the key alone says too little."""
    name = name or key
    if key not in entry:
        raise SphereError(f"the key '{name}' is missing")
    value = entry[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}
        expected = " or ".join(names[kind] for kind in kinds)
        raise SphereError(f"'{name}' should be {expected}, got {value!r:.60}")
    return value


def _text(entry: Mapping[str, Any], key: str, name: str | None = None) -> str:
    text: str = _get(entry, key, str, name=name)
    check_text(text, f"'{name or key}'")
    return text


def _joiner(entry: Mapping[str, Any]) -> str | None:
    """What a record says is to stand between its prompts and targets; it may be empty."""
    return None if entry.get("joiner") is None else str(_get(entry, "joiner", str))


def _optional_text(entry: Mapping[str, Any], key: str, name: str | None = None) -> str | None:
    return None if entry.get(key) is None else _text(entry, key, name)


def _texts(entry: Mapping[str, Any], key: str, optional: bool = False) -> tuple[str, ...]:
    if optional and entry.get(key) is None:
        return ()
    texts = _get(entry, key, list)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise SphereError(f"'{key}' should be a list of non-empty texts")
    for place, text in enumerate(texts):
        check_text(text, f"'{key}'[{place}]")
    return tuple(texts)
