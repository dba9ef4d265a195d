"""Print what a run will take in memory and time, loading no weights.

The flags are those of `sphere edit`; the model's config.json is enough, and the device need not be here.
"""

from __future__ import annotations

import argparse

from sphere.commands.common import add_run_settings, config_of, make_parser


def parser() -> argparse.ArgumentParser:
    """The flags: the fields of `sphere.runs.config.RunConfig`."""
    parser = make_parser(__doc__, "sphere plan")
    add_run_settings(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, plan, print."""
    config = config_of(parser().parse_args(argv))
    from sphere.runs.plan import describe_run

    print(describe_run(config))
    return 0
