"""Texts that generated text is compared with, and the tf-idf vocabulary that compares them.

Published (Meng et al. 2022, ROME, arXiv 2202.05262): `attribute_snippets.json`, Wikipedia passages about subjects
that really have a relation's target, and `idf.npy` with `tfidf_vocab.json`, the vocabulary fitted on all of them. They
are read from the data directory, or fetched; the first fetch that fails is the last one tried.

Where they are not to be had, or know none of the records' targets, both are built from the records themselves: the
references of a target are the true sentences that the records hold about it. Such references are short and few, so
consistency is then comparable between checkpoints and methods, not with published numbers. `References.notes` says
which was used.

Knows records and these files. Knows nothing of models or of generated text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from sphere.data.records import Record, fetch
from sphere.errors import SphereError
from sphere.files import read_json
from sphere.values.joiner import Continued

log = logging.getLogger(__name__)

SNIPPETS, IDF, VOCABULARY = "attribute_snippets.json", "idf.npy", "tfidf_vocab.json"


@dataclass(frozen=True)
class CaseTexts:
    """What one case's generated text is held against.

    Attributes:
        consistency: texts about other subjects that really have the new target.
        essence: those of them that are about the edited subject.
    """

    consistency: tuple[str, ...] = ()
    essence: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class References:
    """Reference texts of some cases, and the vocabulary.

    Attributes:
        notes: in words, where the texts ("reference_texts") and the vocabulary ("tfidf_vocabulary") come from.
        by_case: case_id -> texts; empty for a case without any.
    """

    vectorizer: TfidfVectorizer
    by_case: Mapping[int, CaseTexts]
    notes: Mapping[str, str] = field(default_factory=dict)

    def similarity(self, texts: Sequence[str], case_id: int) -> float | None:
        """tf-idf cosine of the joined texts and the case's joined references, 0 to 1; None without references.

        Texts that share no word with the vocabulary have a similarity of 0.
        """
        references = self.by_case[case_id].consistency
        if not references:
            return None
        rows = self.vectorizer.transform(
            [" ".join(texts), " ".join(references)]
        )  # (2, V), rows of norm 1 or 0
        return float((rows[0] @ rows[1].T).toarray()[0, 0])

    def digest(self, case_id: int) -> str:
        """Changes with anything that `similarity` or the essence texts of this case depend on."""
        own = self.by_case[case_id]
        content = json.dumps([self._vocabulary_digest, own.consistency, own.essence])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _vocabulary_digest(self) -> str:
        terms = sorted(self.vectorizer.vocabulary_.items(), key=lambda item: item[1])
        digest = hashlib.sha256(json.dumps([term for term, _ in terms]).encode())
        digest.update(np.asarray(self.vectorizer.idf_, dtype=np.float64).tobytes())
        return digest.hexdigest()


def load_references(cases: Sequence[Record], dataset: Sequence[Record], data_dir: str | Path) -> References:
    """Reference texts for `cases`.

    Args:
        cases: the records that text is generated for.
        dataset: all records at hand, these among them, from which references are built where none are published.
        data_dir: where the published files are, or are downloaded to.

    Raises:
        SphereError: a file that is there but is not what it should be.
    """
    files = _Published(Path(data_dir))
    named = [record for record in cases if record.relation_id and record.target_new_id]
    snippets = _read_snippets(files.path(SNIPPETS)) if named and files.has(SNIPPETS) else None
    published = _published_texts(cases, snippets or {})
    notes: dict[str, str] = {}
    if snippets and any(texts.consistency for texts in published.values()):
        by_case = published
        notes["reference_texts"] = f"published: {SNIPPETS}"
    else:
        by_case = _built_texts(cases, dataset)
        why = f"{SNIPPETS} knows none of the targets" if snippets else _why_not(files, bool(named))
        notes["reference_texts"] = (
            f"built from the true sentences of {len(dataset)} records ({why}): not comparable with published numbers"
        )
    without = sum(not texts.consistency for texts in by_case.values())
    if without:
        notes["reference_texts"] += f"; {without} of {len(by_case)} cases have none and no consistency"
    vectorizer, notes["tfidf_vocabulary"] = _vocabulary(files, snippets, dataset)
    return References(vectorizer, by_case, notes)


class _Published:
    """The published files of one data directory: there, fetched, or not to be had."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.unreachable = False

    def path(self, name: str) -> Path:
        return self.data_dir / name

    def has(self, name: str) -> bool:
        """Is the file there, or could it be fetched?"""
        if self.path(name).exists():
            return True
        if self.unreachable:
            return False
        try:
            fetch(name, self.path(name))
        except SphereError as error:
            self.unreachable = True
            log.info("%s Going on with texts of the dataset.", error)
            return False
        return True


def _why_not(files: _Published, named: bool) -> str:
    if not named:
        return "the dataset has no Wikidata ids, by which published texts are found"
    return f"no {SNIPPETS} in {files.data_dir}, and it could not be fetched"


# ---- published texts ----

Snippets = dict[tuple[str, str], list[tuple[str, str]]]  # (relation, target) -> (name of the subject, text)


def _read_snippets(path: Path) -> Snippets:
    content = read_json(path, "file of attribute snippets")
    snippets: Snippets = defaultdict(list)
    try:
        for entry in content:
            key = entry["relation_id"], entry["target_id"]
            snippets[key] += [(sample["name"], sample["text"]) for sample in entry["samples"]]
    except (KeyError, TypeError) as error:
        raise SphereError(
            f"{path} is not the published file of attribute snippets ({type(error).__name__}: {error}): replace or "
            "remove it."
        ) from error
    return snippets


def _published_texts(cases: Iterable[Record], snippets: Snippets) -> dict[int, CaseTexts]:
    result = {}
    for record in cases:
        found = snippets.get((record.relation_id or "", record.target_new_id or ""), [])
        result[record.case_id] = CaseTexts(
            consistency=tuple(text for _, text in found),
            essence=tuple(text for name, text in found if name == record.request.subject),
        )
    return result


# ---- texts at hand ----


@dataclass(frozen=True)
class _Statement:
    """A true sentence: a prompt that some record holds, with its real answer."""

    relation_id: str | None
    target: str
    text: str


def _built_texts(cases: Iterable[Record], dataset: Iterable[Record]) -> dict[int, CaseTexts]:
    """All true sentences about a case's new target, of its own relation where relations are known."""
    about: dict[str, list[_Statement]] = defaultdict(list)
    for record in dataset:
        for statement in _statements(record):
            about[statement.target].append(statement)
    result = {}
    for record in cases:
        fitting = [
            statement.text
            for statement in about[record.request.target_new]
            if not (statement.relation_id and record.relation_id)
            or statement.relation_id == record.relation_id
        ]
        result[record.case_id] = CaseTexts(consistency=tuple(dict.fromkeys(fitting)))
    return result


def _statements(record: Record) -> list[_Statement]:
    """Attribute prompts have the new target; the rewrite, its paraphrases and the neighborhood the true one."""
    request = record.request
    sentences = [(prompt, request.target_new) for prompt in record.attribute_prompts]
    if request.target_true is not None:
        sentences += [(prompt, request.target_true) for prompt in (request.text, *record.paraphrase_prompts)]
        sentences += [(prompt, answer or request.target_true) for prompt, answer in record.neighborhood]
    return [
        _Statement(record.relation_id, target, Continued(prompt, target, request.joiner).text + ".")
        for prompt, target in sentences
    ]


# ---- the vocabulary ----


def _vocabulary(
    files: _Published, snippets: Snippets | None, dataset: Sequence[Record]
) -> tuple[TfidfVectorizer, str]:
    """A fitted vectorizer (scikit-learn's defaults, as published), and where it comes from."""
    if files.has(IDF) and files.has(VOCABULARY):
        vectorizer = _read_vocabulary(files.path(IDF), files.path(VOCABULARY))
        return vectorizer, f"published: {IDF} and {VOCABULARY}"
    if snippets:
        texts = [text for samples in snippets.values() for _, text in samples]
        return TfidfVectorizer().fit(texts), f"fitted on the {len(texts)} texts of {SNIPPETS}, as published"
    texts = _all_texts(dataset)
    return (
        TfidfVectorizer().fit(texts),
        f"fitted on the {len(texts)} sentences and prompts of {len(dataset)} records",
    )


def _all_texts(dataset: Iterable[Record]) -> list[str]:
    texts = [
        text
        for record in dataset
        for text in (*(s.text for s in _statements(record)), *record.generation_prompts)
    ]
    return list(dict.fromkeys(texts))


def _read_vocabulary(idf_path: Path, vocabulary_path: Path) -> TfidfVectorizer:
    vocabulary: Any = read_json(vocabulary_path, "tf-idf vocabulary")
    try:
        vectorizer = TfidfVectorizer(vocabulary=vocabulary)
        vectorizer.idf_ = np.load(idf_path, allow_pickle=False)
        vectorizer.transform(["a text"])
    except Exception as error:  # numpy and scikit-learn raise many kinds
        raise SphereError(
            f"{idf_path} and {vocabulary_path} are not the published tf-idf vocabulary ({error}): replace or remove "
            "both."
        ) from error
    return vectorizer
