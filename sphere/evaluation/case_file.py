"""Finished cases of one state of a model, on disk as they are made.

Knows records, dictionaries and files. Knows nothing of models or of how a case is scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere.data.records import Record
from sphere.distributed import Processes
from sphere.evaluation.scoring import Case
from sphere.files import atomic_path

_Key = tuple[int, str]  # case_id and digest of a record


class CaseFile:
    """One JSON line per finished case, after a header line; only complete lines that fit are trusted.

    What is finished and not counted now, such as cases of facts outside of a sample, stands behind the others as spare:
    nothing that took time is lost by a scoring that asks for less.

    Args:
        header: the key of what made the cases; a file with another header is begun anew.
        processes: the main one reads and writes the file, all of them know its cases.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], processes: Processes | None = None) -> None:
        self.path = path
        self.header = header
        self.processes = processes or Processes()
        self._cases: dict[_Key, Case] = {}
        self.take(path)

    def take(self, path: Path) -> None:
        """Know the finished cases of another file, too, if its header is the same; one's own go first."""
        for key, case in self.processes.on_main(lambda: _merged(path, self.header, spare=True)).items():
            self._cases.setdefault(key, case)

    def forget(self, records: Sequence[Record]) -> None:
        """Know the cases of these records no longer."""
        for record in records:
            self._cases.pop(_key(record), None)

    def write(self, records: Sequence[Record], counted: Callable[[Record, Case], Case]) -> None:
        """Write the file anew: the finished cases of `records` as `counted` gives them, all else as spare."""
        lines, asked = [json.dumps(self.header)], {_key(r): r for r in records if _key(r) in self._cases}
        spare = {key: case for key, case in self._cases.items() if key not in asked}
        for key, record in asked.items():
            case = self._cases[key]
            lines.append(_line(key, case=(shown := counted(record, case))))
            if rest := {name: value for name, value in case.items() if name not in shown}:
                spare[key] = {"case_id": record.case_id, **rest}
        self._put(self.path, [*lines, *(_line(key, spare=case) for key, case in spare.items())])

    def write_to(self, path: Path, records: Sequence[Record]) -> None:
        """Write another file of the cases of `records`, which are finished."""
        lines = [_line(key, case=self._cases[key]) for key in map(_key, records)]
        self._put(path, [json.dumps(self.header), *lines])

    def _put(self, path: Path, lines: Sequence[str]) -> None:
        if self.processes.main:
            with atomic_path(path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", "utf-8")

    def digest(self, records: Sequence[Record]) -> str:
        """Changes with the header, with anything in the records, and with their order."""
        content = json.dumps([self.header, [_digest(record) for record in records]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def get(self, record: Record) -> Case | None:
        """The finished case of exactly this record."""
        return self._cases.get(_key(record))

    def __getitem__(self, record: Record) -> Case:
        """The same of a record whose case is finished."""
        return self._cases[_key(record)]

    def append(self, records: Sequence[Record], cases: Sequence[Case]) -> None:
        """Add finished cases, at once on disk."""
        added = {_key(record): case for record, case in zip(records, cases, strict=True)}
        self._cases |= added
        if not self.processes.main:
            return
        with self.path.open("a", encoding="utf-8") as out:
            out.write("".join(_line(key, case=case) + "\n" for key, case in added.items()))


def read_cases(path: Path) -> list[Case]:
    """The cases of a file that its scoring counted, whatever made them; [] where there is none."""
    return list(_merged(path).values())


def _merged(path: Path, header: Mapping[str, Any] | None = None, spare: bool = False) -> dict[_Key, Case]:
    """The cases of complete lines, if the header is this one (None: any); what comes later adds to what came before.

    Args:
        spare: with what was not counted.
    """
    if not path.exists():
        return {}
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is incomplete
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    if not lines or header not in (None, lines[0]):
        return {}
    found: dict[_Key, Case] = {}
    for line in lines[1:]:
        part = line.get("case") or (line.get("spare") if spare else None)
        if part and "record" in line:
            key = (part["case_id"], line["record"])
            found[key] = found.get(key, {}) | part
    return found


def _line(key: _Key, **case: Case) -> str:
    return json.dumps({"record": key[1], **case}, ensure_ascii=False, allow_nan=False)


def _key(record: Record) -> _Key:
    return record.case_id, _digest(record)


def _digest(record: Record) -> str:
    """Changes with anything in the record."""
    text = repr(record) + (repr(record.probes) if record.probes else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
