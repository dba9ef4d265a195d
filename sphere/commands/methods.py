"""Print every method with its reference, its defaults and the models that it has hyperparameters for."""

from __future__ import annotations

import argparse

from sphere.commands.common import add_settings, make_parser


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere methods")
    add_settings(parser, ["hparams_dir"])
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, print."""
    arguments = parser().parse_args(argv)
    from sphere.runs.method_list import describe_methods

    print(describe_methods(arguments.hparams_dir))
    return 0
