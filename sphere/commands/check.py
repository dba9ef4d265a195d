"""Show how a table of facts will be read, and what is wrong with it, before anything is edited.

    sphere check facts.csv
    sphere check facts.csv --model_name SmolLM2-135M

Each row is shown as it will be edited: its prompt with the subject's last token, where the edit takes hold, marked, and
the target's tokens. Bad rows are listed with their numbers, and so are facts that repeat or contradict others. With
--known, the model is loaded and the facts that it says already are named. Exit code 0 where every row can be used, 1
where some cannot.
"""

from __future__ import annotations

import argparse

from sphere.commands.common import add_settings, make_parser

EXIT_BAD_ROWS = 1


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere check")
    parser.add_argument(
        "facts", metavar="FILE", help="a .csv, .tsv, .json or .jsonl file, or - for standard input"
    )
    add_settings(parser, ["subjects", "model_name", "device", "dtype"])
    parser.add_argument(
        "--known", action="store_true", help="load the model and name the facts that it knows already"
    )
    parser.add_argument("--rows", type=int, default=20, help="show the first so many rows; 0: all")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, read, print."""
    args = parser().parse_args(argv)
    from sphere.runs.check_facts import check_facts

    report = check_facts(
        args.facts,
        args.subjects,
        args.model_name,
        known=args.known,
        device=args.device,
        dtype=args.dtype,
        shown=args.rows or None,
    )
    print("\n".join(report.lines))
    return EXIT_BAD_ROWS if report.bad else 0
