"""Facts to edit and the prompts that measure the edit, read from the published datasets' own formats.

Knows the formats of CounterFact (cf, mcf), of zsRE as MEND published it, and where to fetch them. Knows
nothing of models, tokenizers or scores.
"""

from __future__ import annotations

import http.client
import logging
import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from sphere.errors import SphereError
from sphere.files import atomic_path, read_json
from sphere.requests import EditRequest
from sphere.resources import shipped

log = logging.getLogger(__name__)

PUBLISHED_HOME = "https://memit.baulab.info/data/dsets"
FILES = {
    "starter": "starter.json",
    "cf": "counterfact.json",
    "mcf": "multi_counterfact.json",
    "zsre": "zsre_mend_eval.json",
}
TIMEOUT_SECONDS = 20
CHUNK_BYTES = 1 << 16


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
    kind: Literal["counterfact", "zsre"] = "counterfact"
    relation_id: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood: tuple[tuple[str, str | None], ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    target_new_id: str | None = None


def load_records(ds_name: str, data_dir: str | Path = "data", limit: int | None = None) -> list[Record]:
    """The first `limit` records of a dataset (all by default, fewer where it has fewer), in its order.

    Args:
        ds_name: "starter" (shipped with the project), "cf", "mcf" or "zsre".
        data_dir: where the published file is, or is downloaded to.

    Raises:
        SphereError: unknown dataset, a file that is neither there nor to be had, or a bad record (the
            sentence names file, index and key).
    """
    if ds_name not in FILES:
        raise SphereError(f"Unknown dataset '{ds_name}': use one of {', '.join(FILES)}.", argument="ds_name")
    if limit is not None and limit < 1:
        raise SphereError(
            f"The dataset limit is {limit}: give a number of records of at least 1.",
            argument="dataset_size_limit",
        )
    path = _locate(ds_name, Path(data_dir))
    content = read_json(path, "dataset")
    if not isinstance(content, list) or not content:
        raise SphereError(f"The dataset {path} is not a list of records: replace it by the published file.")
    read = _zsre if ds_name == "zsre" else _counterfact
    records = [_read(read, path, index, entry) for index, entry in enumerate(content[:limit])]
    seen: dict[int, int] = {}
    for index, record in enumerate(records):
        first = seen.setdefault(record.case_id, index)
        if first != index:
            raise SphereError(
                f"Records {first} and {index} of {path} share the case_id {record.case_id}: renumber one."
            )
    log.info("%s: %d of %d records", path, len(records), len(content))
    return records


# ---- warning the file ----


def _locate(ds_name: str, data_dir: Path) -> Path:
    path = data_dir / FILES[ds_name]
    if path.exists():
        return path
    if ds_name != "starter":
        fetch(FILES[ds_name], path)
        return path
    embedded = shipped("data") / FILES[ds_name]
    if not embedded.exists():
        raise SphereError(
            f"No {FILES[ds_name]} in {data_dir} or {embedded.parent}: build it with "
            "`python -m scripts.build_starter`.",
            argument="data_dir",
        )
    return embedded


def fetch(file: str, path: Path) -> None:
    """Download one file of the datasets' published home to `path`, with a progress bar, atomically.

    Raises:
        SphereError: no network, or the download broke off; nothing is left behind.
    """
    url = f"{PUBLISHED_HOME}/{file}"
    try:
        content = _download(url, file)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise SphereError(
            f"No {file} in {path.parent}, and {url} cannot be fetched ({reason}): put the published file at "
            f"{path}, or name the folder that holds it.",
            argument="data_dir",
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _download(url: str, name: str) -> bytes:
    content = bytearray()
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        length = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, desc=name, unit="B", unit_scale=True) as bar:
            while chunk := response.read(CHUNK_BYTES):
                content += chunk
                bar.update(len(chunk))
    if len(content) < length:
        raise ConnectionError(f"the connection closed after {len(content)} of {length} bytes")
    return bytes(content)


# ---- reading a record ----


class _BadRecord(Exception):
    """Says what is wrong with which key; `_read` adds the file and the record's index."""


def _read(read: Callable[[Mapping[str, Any], int], Record], path: Path, index: int, entry: Any) -> Record:
    try:
        if not isinstance(entry, dict):
            raise _BadRecord(f"it is a {type(entry).__name__}, not an object with keys")
        return read(entry, index)
    except (_BadRecord, SphereError) as error:
        raise SphereError(f"Record {index} of {path} cannot be used: {str(error).rstrip('.')}.") from error


def _counterfact(entry: Mapping[str, Any], index: int) -> Record:
    """CounterFact (Meng et al. 2022, ROME, arXiv 2202.05262); mcf is the part of it that MEMIT uses."""
    case_id = _get(entry, "case_id", int)
    rewrite = _get(entry, "requested_rewrite", dict, list)
    if isinstance(rewrite, list):
        if len(rewrite) != 1 or not isinstance(rewrite[0], dict):
            raise _BadRecord("'requested_rewrite' should be one object, or a list of one")
        rewrite = rewrite[0]
    prompt = _get(rewrite, "prompt", str)
    if "{}" not in prompt:
        raise _BadRecord(f"'prompt' has no '{{}}' for the subject: {prompt!r}")
    new, true = _get(rewrite, "target_new", dict), _get(rewrite, "target_true", dict)
    request = EditRequest(
        case_id, prompt, _get(rewrite, "subject", str), _get(new, "str", str), _get(true, "str", str)
    )
    return Record(
        case_id,
        request,
        "counterfact",
        relation_id=rewrite.get("relation_id"),
        paraphrase_prompts=_texts(entry, "paraphrase_prompts"),
        neighborhood=tuple((prompt, None) for prompt in _texts(entry, "neighborhood_prompts")),
        attribute_prompts=_texts(entry, "attribute_prompts", optional=True),
        generation_prompts=_texts(entry, "generation_prompts", optional=True),
        target_new_id=new.get("id"),
    )


def _zsre(entry: Mapping[str, Any], index: int) -> Record:
    """zsRE as MEND published it (Mitchell et al. 2022, arXiv 2110.11309), read as MEMIT does.

    The new target is the first true answer (`answers`), not the distractor `alt`; the neighbor is an
    unrelated question of Natural Questions, asked with a question mark.
    """
    subject, question = _get(entry, "subject", str), _get(entry, "src", str)
    answers = _get(entry, "answers", list)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise _BadRecord("'answers' should be a list of at least one text")
    request = EditRequest(index, _template(question, subject), subject, answers[0])
    unrelated = _get(entry, "loc", str)
    if not unrelated.startswith("nq question: "):
        raise _BadRecord(f"'loc' should begin with 'nq question: ', got {unrelated!r}")
    return Record(
        index,
        request,
        "zsre",
        paraphrase_prompts=(_get(entry, "rephrase", str),),
        neighborhood=((unrelated + "?", _get(entry, "loc_ans", str)),),
    )


def _template(question: str, subject: str) -> str:
    """Put `{}` in the subject's place: its first occurrence as whole words, else as part of one."""
    if not subject.strip():
        raise _BadRecord("'subject' is empty")
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", question) or re.search(
        re.escape(subject), question
    )
    if not found:
        raise _BadRecord(f"its subject {subject!r} is not in 'src': {question!r}")
    return question[: found.start()] + "{}" + question[found.end() :]


def _get(entry: Mapping[str, Any], key: str, *kinds: type) -> Any:
    if key not in entry:
        raise _BadRecord(f"the key '{key}' is missing")
    value = entry[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}
        expected = " or ".join(names[kind] for kind in kinds)
        raise _BadRecord(f"'{key}' should be {expected}, got {value!r:.60}")
    return value


def _texts(entry: Mapping[str, Any], key: str, optional: bool = False) -> tuple[str, ...]:
    if optional and entry.get(key) is None:
        return ()
    texts = _get(entry, key, list)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise _BadRecord(f"'{key}' should be a list of non-empty texts")
    return tuple(texts)
