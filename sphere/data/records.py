"""Datasets: facts to edit and the prompts that measure the edit, found on the disk or fetched.

Knows where the datasets are; how their records read is in `sphere.data.formats`. Knows nothing of models, tokenizers or
scores.
"""

from __future__ import annotations

import http.client
import logging
import random
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sphere.data.benchmarks import NoSubject, read_benchmark
from sphere.data.formats import Kind, Record, read_record
from sphere.data.subjects import SubjectFinder
from sphere.data.tables import read_table
from sphere.errors import SphereError
from sphere.files import atomic_path, read_json
from sphere.resources import shipped

log = logging.getLogger(__name__)

PUBLISHED_HOME = "https://memit.baulab.info/data/dsets"
FILES = {
    "starter": "starter.json",
    "facts_zh": "facts_zh.json",
    "cf": "counterfact.json",
    "mcf": "multi_counterfact.json",
    "zsre": "zsre_mend_eval.json",
    "mquake_cf": "MQuAKE-CF-3k-v2.json",
    "ripple_recent": "RippleEdits/recent.json",
    "ripple_random": "RippleEdits/random.json",
    "ripple_popular": "RippleEdits/popular.json",
    "wiki_big_edit": "WikiBigEdit.json",
    "ultra_edit_bench": "UltraEditBench.json",
    "knowedit_recent": "KnowEdit/wiki_recent.json",
    "knowedit_counterfact": "KnowEdit/wiki_counterfact.json",
    "hallu_edit_bench": "HalluEditBench.csv",
}
# Where a benchmark that is not fetched is published, by the beginning of its file's path.
HOMES = {
    "MQuAKE": "https://github.com/princeton-nlp/MQuAKE",
    "RippleEdits": "https://github.com/edenbiran/RippleEdits",
    "WikiBigEdit": "https://huggingface.co/datasets/lukasthede/WikiBigEdit",
    "UltraEditBench": "https://huggingface.co/datasets/XiaojieGu/UltraEditBench",
    "KnowEdit": "https://huggingface.co/datasets/zjunlp/KnowEdit",
    "HalluEditBench": "https://github.com/llm-editing/HalluEditBench",
}
BUILT_IN_FORMATS = ("starter", "facts_zh", "cf", "mcf", "zsre")
SHIPPED = ("starter", "facts_zh")
TIMEOUT_SECONDS = 20
CHUNK_BYTES = 1 << 16

__all__ = ["FILES", "Record", "fetch", "load_records", "shuffled"]


def load_records(ds_name: str, data_dir: str | Path = "data", limit: int | None = None) -> list[Record]:
    """The first `limit` records of a dataset (all by default, fewer where it has fewer), in its order.

    A benchmark's records that have no usable subject are left out, with a warning that counts them. A case of several
    edits is taken whole or not at all.

    Args:
        ds_name: one of `FILES`: "starter" and "facts_zh" are shipped with the project.
        data_dir: where the published file is, or is downloaded to.

    Raises:
        SphereError: unknown dataset, a file that is neither there nor available, or a bad record (the
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
    content = _content(path)
    if ds_name in BUILT_IN_FORMATS:
        kind: Kind = "zsre" if ds_name == "zsre" else "counterfact"
        records = [_read(kind, path, index, entry) for index, entry in enumerate(content[:limit])]
    else:
        records = _read_benchmark(ds_name, path, content, limit)
    seen: dict[int, int] = {}
    for index, record in enumerate(records):
        first = seen.setdefault(record.case_id, index)
        if first != index:
            raise SphereError(
                f"Records {first} and {index} of {path} share the case_id {record.case_id}: renumber one."
            )
    log.info("%s: %d of %d records", path, len(records), len(content))
    return records


def shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    """The same records in an order that the seed decides; those of one group stay together, in their order."""
    keys = ((r.group, index if r.group is None else None) for index, r in enumerate(records))
    order = [[r for _, r in pairs] for _, pairs in groupby(zip(keys, records, strict=True), lambda p: p[0])]
    random.Random(seed).shuffle(order)
    return [record for group in order for record in group]


def _content(path: Path) -> list[Any]:
    """What a file holds, record by record."""
    if path.suffix == ".csv":
        try:
            return [row.values for row in read_table(path)]
        except SphereError as error:
            raise SphereError(str(error), argument="data_dir") from error
    content = read_json(path, "dataset")
    if not isinstance(content, list) or not content:
        raise SphereError(f"The dataset {path} is not a list of records: replace it by the published file.")
    return content


def _read_benchmark(ds_name: str, path: Path, content: Iterable[Any], limit: int | None) -> list[Record]:
    """The first `limit` facts of a benchmark that can be edited, and a warning on those that cannot."""
    finder = SubjectFinder()
    records: list[Record] = []
    skipped: list[str] = []
    for index, entry in enumerate(content):
        try:
            found = read_benchmark(ds_name, index, entry, finder)
        except NoSubject as error:
            skipped.append(f"record {index}: {str(error).rstrip('.')}")
            continue
        except SphereError as error:
            raise _unusable(path, index, error) from error
        if limit is not None and len(records) + len(found) > limit:
            break
        records += [_numbered(record, len(records) + place) for place, record in enumerate(found)]
        if len(records) == limit:
            break
    if skipped:
        log.warning("%s: %d records cannot be edited and are left out (%s).", path, len(skipped), skipped[0])
    if not records and skipped:
        raise SphereError(
            f"None of the records of {path} can be edited ({skipped[0]}): replace it by the published file.",
            argument="data_dir",
        )
    if not records:
        raise SphereError(
            f"The first case of {path} has more edits than the limit of {limit}: give a larger one.",
            argument="dataset_size_limit",
        )
    return records


def _numbered(record: Record, number: int) -> Record:
    """A record of a case of several edits gets a number of its own; others are known by their place in the file."""
    if record.group is None:
        return record
    return replace(record, case_id=number, request=replace(record.request, case_id=number))


def _read(kind: Kind, path: Path, index: int, entry: object) -> Record:
    try:
        return read_record(kind, index, entry)
    except SphereError as error:
        raise _unusable(path, index, error) from error


def _unusable(path: Path, index: int, error: SphereError) -> SphereError:
    return SphereError(f"Record {index} of {path} cannot be used: {str(error).rstrip('.')}.")


def _locate(ds_name: str, data_dir: Path) -> Path:
    path = data_dir / FILES[ds_name]
    if path.exists():
        return path
    home = next((home for name, home in HOMES.items() if FILES[ds_name].startswith(name)), None)
    if home:
        raise SphereError(
            f"No {FILES[ds_name]} in {data_dir}: get the published file from {home} and put it at {path}.",
            argument="data_dir",
        )
    if ds_name not in SHIPPED:
        fetch(FILES[ds_name], path)
        return path
    embedded = shipped("data") / FILES[ds_name]
    if not embedded.exists():
        raise SphereError(
            f"No {FILES[ds_name]} in {data_dir} or {embedded.parent}: it comes with the project, put it back"
            f"{' or build it with `python -m scripts.build_starter`' if ds_name == 'starter' else ''}.",
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
