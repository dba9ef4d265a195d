"""Finished cases of one state of a model, on disk as they are made.

Knows records, dictionaries and files. Knows nothing of models or of how a case is scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere.data.records import Record
from sphere.distributed import Processes
from sphere.evaluation.scoring import Case
from sphere.files import atomic_path


class CaseFile:
    """One JSON line per finished case, after a header line; only complete lines that fit are trusted.

    Args:
        header: the key of what made the cases; a file with another header is begun anew.
        processes: the main one reads and writes the file, all of them know its cases.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], processes: Processes | None = None) -> None:
        self.path = path
        self.header = header
        self.processes = processes or Processes()
        self._cases: dict[tuple[int, str], Case] = {}
        self.take(path)

    def begin(self, kept: Sequence[Record]) -> None:
        """Write the file anew with the finished cases of `kept` only."""
        self._cases = {(r.case_id, _digest(r)): self[r] for r in kept}
        self.write_to(self.path)

    def take(self, path: Path) -> None:
        """Know the finished cases of another file, too, if its header is the same; one's own go first."""
        for line in self.processes.on_main(lambda: _trusted(path, self.header)):
            self._cases.setdefault((line["case"]["case_id"], line["record"]), line["case"])

    def write_to(self, path: Path) -> None:
        """Write a file of the cases that are known."""
        if not self.processes.main:
            return
        lines = [json.dumps(self.header), *(_line(digest, c) for (_, digest), c in self._cases.items())]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", "utf-8")

    def digest(self, records: Sequence[Record]) -> str:
        """Changes with the header, with anything in the records, and with their order."""
        content = json.dumps([self.header, [_digest(record) for record in records]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def get(self, record: Record) -> Case | None:
        """The finished case of exactly this record."""
        return self._cases.get((record.case_id, _digest(record)))

    def __getitem__(self, record: Record) -> Case:
        """The same of a record whose case is finished."""
        return self._cases[record.case_id, _digest(record)]

    def append(self, records: Sequence[Record], cases: Sequence[Case]) -> None:
        """Add finished cases, at once on disk."""
        added = {(r.case_id, _digest(r)): case for r, case in zip(records, cases, strict=True)}
        self._cases |= added
        if not self.processes.main:
            return
        with self.path.open("a", encoding="utf-8") as out:
            out.write("".join(_line(digest, case) + "\n" for (_, digest), case in added.items()))


def read_cases(path: Path) -> list[Case]:
    """The finished cases of a file, whatever made them; [] where there is none."""
    return [line["case"] for line in _trusted(path)]


def _trusted(path: Path, header: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The complete lines of cases, if the header is this one (None: any)."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is incomplete
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    if not lines or header not in (None, lines[0]):
        return []
    return [line for line in lines[1:] if {"record", "case"} <= line.keys()]


def _line(digest: str, case: Case) -> str:
    return json.dumps({"record": digest, "case": case}, ensure_ascii=False, allow_nan=False)


def _digest(record: Record) -> str:
    """Changes with anything in the record."""
    text = repr(record) + (repr(record.probes) if record.probes else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
