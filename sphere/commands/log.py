"""List and search the ledger of a run: every edit, with its batch, time and loss, and what was undone.

    sphere log RUN
    sphere log RUN Darrieux
    sphere log RUN --batch 2
    sphere log RUN --case 17 --json

Words are looked for in prompts, subjects and targets, up to case; an edit must have all of them. Batches are counted
from 1, as `sphere undo --batch` counts them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sphere.commands.common import make_parser, positive_int

if TYPE_CHECKING:
    from sphere.runs.ledger import Entry


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere log")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("words", metavar="WORD", nargs="*", help="list only edits with all of these words")
    parser.add_argument("--batch", type=positive_int, default=None, help="list only this batch")
    parser.add_argument(
        "--case", type=int, nargs="+", metavar="ID", default=(), help="list only these case_ids"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each edit")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, read, print."""
    args = parser().parse_intermixed_args(argv)
    from sphere.runs.ledger import (
        current_edits,
        read_entries,
        read_history,
        search,
        to_json,
        undone_cases,
    )

    entries = read_entries(args.run)
    undone = undone_cases(args.run, current_edits(args.run))
    found = search(entries, args.words, args.case, args.batch)
    if args.json:
        for entry, place in found:
            print(json.dumps(to_json(entry, place, undone), ensure_ascii=False))
        return 0
    shown = None
    for entry, place in found:
        if entry is not shown:
            print(
                f"batch {entry.batch}, {entry.when}, {len(entry.requests)} facts, {entry.n_edits} edits after it"
            )
            shown = entry
        print(_line(entry, place, undone))
    every = sum(len(entry.requests) for entry in entries)
    print(f"{len(found)} of {every} edits; {len(undone)} are undone.")
    for event in [] if args.words or args.case or args.batch else read_history(args.run):
        print(_event(event))
    return 0


def _line(entry: Entry, place: int, undone: frozenset[int]) -> str:
    request, loss = entry.requests[place], entry.losses[place]
    marked = request.prompt.replace("{}", f"[{request.subject}]")
    replaced = f" (was {request.target_true})" if request.target_true else ""
    known = f"{loss:.3f}" if loss is not None else "-"
    state = "  undone" if request.case_id in undone else ""
    return f"  case {request.case_id:<6} loss {known:>6}  {marked} -> {request.target_new}{replaced}{state}"


def _event(event: Mapping[str, Any]) -> str:
    cases = ", ".join(map(str, event["case_ids"]))
    before, after = (_percent(one["success"]) for one in event["chosen"])
    return f"{event['when']} {event['what']} of case {cases}: efficacy {before} -> {after}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
