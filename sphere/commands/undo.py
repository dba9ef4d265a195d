"""Take edits out of a run's weights again, and measure what that does to them and to the others.

    sphere undo RUN --batch 2
    sphere undo RUN --case 17 23
    sphere undo RUN --all

The run's last checkpoint gives way to the state without these edits: the original weights plus the updates of all other
edits, in their order. Undoing everything gives the original weights, and `sphere redo` of everything the edited ones,
bit for bit. A single case can be undone where a batch's update is a sum over its facts (AlphaEdit, MEMIT, MEMIT_seq and
ROME, with or without SPHERE); batches can always be, if their updates were kept (--ledger of `sphere edit`).
"""

from __future__ import annotations

import argparse

from sphere.commands.common import add_settings, make_parser, positive_int

EXACT = {
    "original": "These are the original weights, bit for bit.",
    "edited": "These are the weights as they were edited, bit for bit.",
    "": "",
}


def parser(description: str | None = __doc__, name: str = "undo") -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(description, f"sphere {name}")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--batch", type=positive_int, default=None, help="a batch, counted from 1 (`sphere log`)"
    )
    which.add_argument(
        "--case", type=int, nargs="+", metavar="ID", default=(), help="edits by their case_ids"
    )
    which.add_argument("--all", action="store_true", help="all edits")
    add_settings(
        parser,
        ("model_name", "device", "device_map"),
        model_name={"default": None, "help": "the unedited model (default: what the run names)"},
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, undo, print."""
    return change_and_tell("undo", parser().parse_args(argv))


def change_and_tell(what: str, args: argparse.Namespace) -> int:
    """Undo or redo what the flags choose, and print what it did."""
    from sphere.evaluation.run_model import ModelOptions
    from sphere.evaluation.undo import Choice, Efficacy, change

    choice = Choice(batch=args.batch, cases=tuple(args.case), everything=args.all)
    options = ModelOptions(model_name=args.model_name, device=args.device, device_map=args.device_map)
    found = change(args.run, what, choice, options)

    def row(name: str, pair: tuple[Efficacy, Efficacy]) -> str:
        cells = (
            "-" if a is None or b is None else f"{100 * a:.1f} -> {100 * b:.1f} %"
            for a, b in ((pair[0].success, pair[1].success), (pair[0].accuracy, pair[1].accuracy))
        )
        return f"{name:<10} {pair[0].n:>6}   {next(cells):<20}{next(cells)}"

    done = "undone" if what == "undo" else "redone"
    edits, left = "edit" if len(found.case_ids) == 1 else "edits", found.n_edits - found.n_undone
    print(f"{len(found.case_ids)} {edits} {done}; {left} of {found.n_edits} are in the weights.")
    print(f"{'':<10} {'facts':>6}   {'efficacy':<20}accuracy")
    print(row(done, found.chosen))
    print(row("others", found.others))
    print(f"Weights: {found.path}. {EXACT[found.exact]}".rstrip())
    return 0
