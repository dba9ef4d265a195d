"""Compare runs in figures and one self-contained HTML page.

Shows whatever the folders hold: run.json and batches.jsonl of `sphere edit`, summary/ and rect_eval/ of `sphere score`,
and the checkpoints. Runs that edited the same facts in the same order, and that differ in nothing but SPHERE and the
rules, are compared fact by fact with the plain one among them; runs that differ in their seed only are one
configuration of a comparison over facts and seeds. Loads no model. Writes report/report.html, report/tables.md,
report/paired.json, report/comparison.json and report/figures/. `python -m scripts.report` is the same command, in a
checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sphere.commands.common import make_parser


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere report")
    parser.add_argument(
        "--weight_folder",
        type=Path,
        nargs="+",
        required=True,
        help="folders of runs, as `sphere edit` wrote them",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="where report/ is written (default: the first run's folder)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        default=None,
        help="compare all runs with this one, whatever their settings (default: with the plain one among those that "
        "differ in nothing but SPHERE and the rules)",
    )
    parser.add_argument(
        "--reference",
        metavar="LABEL",
        default=None,
        help="of runs with several seeds, or of several methods: the configuration that the comparison has the paired "
        "differences to, by its label in the table (default: the first)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, draw, print."""
    args = parser().parse_args(argv)
    from sphere.report import make_report, report_text

    page = make_report(args.weight_folder, args.out, against=args.against, reference=args.reference)
    if text := report_text(page):
        print(f"{text}\n")
    print(f"Report: {page}")
    return 0
