"""Show the hyperparameters that a run would use, or write a file of the defaults for a model that has none.

A model is reached by the module paths of its hyperparameters. Where there is no file for it, they are found in the
model (its configuration is enough), and the numbers are the method's defaults, which are not tuned for it.

Examples:
    sphere hparams --model_name=./my-model --alg_name=MEMIT
    sphere hparams --model_name=./my-model --alg_name=MEMIT --write
"""

from __future__ import annotations

import argparse

from sphere.commands.common import add_settings, config_of, make_parser

FLAGS = ("alg_name", "model_name", "hparams_fname", "hparams_dir", "overwrite")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere hparams")
    groups = add_settings(
        parser,
        FLAGS,
        overwrite={"help": "with --write: replace a file that is there"},
        hparams_fname={
            "help": "file to show or to write in <hparams_dir>/<alg_name>/ (default: model's name + .json)"
        },
    )
    groups["output"].add_argument(
        "--write",
        action="store_true",
        help="write the defaults for this model into <hparams_dir>/<alg_name>/",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, find, print or write."""
    arguments = parser().parse_args(argv)
    config = config_of(arguments)
    from sphere.defaults import default_hparams
    from sphere.models import meta_model
    from sphere.runs.hparams import format_hparams, hparams_of, write_hparams

    if not arguments.write:
        print(format_hparams(config.model_name, hparams_of(config).to_dict()), end="")
        return 0
    hparams = default_hparams(meta_model(config.model_name), config.alg_name, config.hparams_dir)
    path = write_hparams(config, hparams, overwrite=config.overwrite)
    print(f"Hyperparameters: {path}")
    return 0
