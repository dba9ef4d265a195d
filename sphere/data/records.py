"""Datasets: facts to edit and the prompts that measure the edit, found on the disk or fetched.

Knows where the datasets are; how their records read is in `sphere.data.formats`. Knows nothing of models, tokenizers or
scores.
"""

from __future__ import annotations

import http.client
import logging
import random
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from sphere.data.formats import Kind, Record, read_record
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
}
SHIPPED = ("starter", "facts_zh")
TIMEOUT_SECONDS = 20
CHUNK_BYTES = 1 << 16

__all__ = ["FILES", "Record", "fetch", "load_records", "shuffled"]


def load_records(ds_name: str, data_dir: str | Path = "data", limit: int | None = None) -> list[Record]:
    """The first `limit` records of a dataset (all by default, fewer where it has fewer), in its order.

    Args:
        ds_name: "starter" or "facts_zh" (shipped with the project), "cf", "mcf" or "zsre".
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
    content = read_json(path, "dataset")
    if not isinstance(content, list) or not content:
        raise SphereError(f"The dataset {path} is not a list of records: replace it by the published file.")
    kind: Kind = "zsre" if ds_name == "zsre" else "counterfact"
    records = [_read(kind, path, index, entry) for index, entry in enumerate(content[:limit])]
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
    """The same records in an order that the seed decides."""
    order = list(records)
    random.Random(seed).shuffle(order)
    return order


def _read(kind: Kind, path: Path, index: int, entry: object) -> Record:
    try:
        return read_record(kind, index, entry)
    except SphereError as error:
        raise SphereError(f"Record {index} of {path} cannot be used: {str(error).rstrip('.')}.") from error


def _locate(ds_name: str, data_dir: Path) -> Path:
    path = data_dir / FILES[ds_name]
    if path.exists():
        return path
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
