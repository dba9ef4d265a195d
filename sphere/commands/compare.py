"""Ask the last states of several runs the same prompts, side by side.

    sphere compare RUN RUN2 --prompts facts.csv
    sphere compare RUN RUN2 --prompts prompts.txt --targets English French --json > answers.jsonl

A column for the unedited model and one for each run; runs of one model load it once. At the end it is said how many
continuations differ from the unedited ones, and how likely the first target of each prompt is.
"""

from __future__ import annotations

import argparse

from sphere.commands.ask import add_asking_flags, asking_options, model_options, prompts_of, show
from sphere.commands.common import make_parser


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere compare")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    add_asking_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, ask, print."""
    args = parser().parse_args(argv)
    from sphere.answers import questions_of
    from sphere.evaluation.ask_run import compare_runs
    from sphere.evaluation.ask_table import format_comparison

    questions = questions_of(prompts_of(args), args.targets)
    found = compare_runs(args.runs, questions, model_options(args), asking_options(args))
    for asked in found:
        show(asked, args.json)
    if not args.json:
        print(format_comparison(found))
    return 0
