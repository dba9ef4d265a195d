"""Compare runs in figures and one self-contained HTML page.

Shows whatever the folders hold: run.json and batches.jsonl of `sphere edit`, summary/ and rect_eval/ of `sphere score`,
and the checkpoints. Loads no model. Writes report/report.html and report/figures/. `python -m scripts.report` is the
same command, in a checkout.
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, draw, print."""
    args = parser().parse_args(argv)
    from sphere.report import make_report

    print(f"Report: {make_report(args.weight_folder, args.out)}")
    return 0
