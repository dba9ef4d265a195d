"""Find the layers and hyperparameters of a method for a model, and write <hparams_dir>/<alg_name>/<model>.json.

Layers: causal tracing on facts that the model knows; as many as the start has, ending where the effect is largest.
Numbers: a search (Optuna) for the best score on a tuning set of 40 facts, which must not cost the model its fluency.
Edits are made as `sphere edit` makes them with the same flags. Tables, figures and the state of the search are in

    <output_dir>/tune/<alg_name>/<model>/

A tuning that was stopped goes on with the same command, to the same result; more trials may be asked for later.

Examples:
    sphere tune --model_name=./my-model --from_hparams=hparams/AlphaEdit/Qwen2.5-7B.json --mom2_dataset=self
    sphere tune --model_name=./my-model --alg_name=MEMIT --layers=4,5,6,7,8 --n_trials=30 --timeout_minutes=120

`python -m experiments.tune` is the same command, in a checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys

from sphere.commands.common import add_settings, make_parser, positive_int
from sphere.data.records import FILES
from sphere.runs.config import PROGRAM, RunConfig

SETTINGS = (
    *(
        "alg_name",
        "model_name",
        "hparams_fname",
        "hparams_dir",
        "ds_name",
        "data_dir",
        "num_edits",
        "beta_hse",
    ),
    *("alpha", "alpha_budget"),
    *("rules", "directions", "project", "revive_tau", "seed", "device", "dtype", "device_map"),
    *(
        "stats_dir",
        "stats_from",
        "output_dir",
        "batch_tokens",
        "z_matmul_dtype",
        "conserve_memory",
        "overwrite",
    ),
)


def parser() -> argparse.ArgumentParser:
    """The flags: some fields of `sphere.runs.config.RunConfig`, and those of `sphere.tuning.options.TuneOptions`."""
    from sphere.tuning.options import TuneOptions

    defaults = {field.name: field.default for field in dataclasses.fields(TuneOptions)}
    parser = make_parser(__doc__, "sphere tune")
    groups = add_settings(
        parser,
        SETTINGS,
        hparams_fname={
            "help": "the file to write in <hparams_dir>/<alg_name>/ (default: the model's name + .json)"
        },
        hparams_dir={"help": "where the file is written"},
        ds_name={"choices": tuple(FILES), "help": "the dataset that the tuning set is drawn from"},
        output_dir={"help": "where tables, figures and the state of the search are kept"},
        overwrite={"help": "replace a hyperparameter file that is there, and a tuning of other settings"},
    )
    groups["editing"].add_argument(
        "--from_hparams",
        metavar="FILE",
        help="a hyperparameter file whose numbers to start from (default: what `sphere edit` would use)",
    )
    groups["editing"].add_argument(
        "--layers", type=_layers, help="the layers to edit, e.g. 4,5,6,7,8 (default: by causal tracing)"
    )
    groups["editing"].add_argument(
        "--mom2_dataset", help="corpus of the second moments, in place of the start's"
    )
    groups["editing"].add_argument(
        "--mom2_n_samples", type=positive_int, help="documents of that corpus, in place of the start's"
    )
    tuning = parser.add_argument_group("tuning")
    explained = {
        "n_facts": "facts of the tuning set, drawn from the second half of the dataset",
        "n_trials": "trials in all, those of earlier sessions included",
        "trace_facts": "known facts that are traced",
        "trace_draws": "draws of noise for each traced fact",
    }
    for name, text in explained.items():
        tuning.add_argument(f"--{name}", type=positive_int, default=defaults[name], help=text)
    tuning.add_argument(
        "--timeout_minutes",
        type=float,
        default=defaults["timeout_minutes"],
        help="begin no trial that would end later than this after the start",
    )
    tuning.add_argument(
        "--max_perplexity",
        type=float,
        default=defaults["max_perplexity"],
        help="perplexity of the fixed text, relative to the unedited model's, above which a score is reduced",
    )
    tuning.add_argument(
        "--trace_table",
        metavar="FILE",
        default=defaults["trace_table"],
        help="table of facts that tracing draws from",
    )
    return parser


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer numbers such as 4,5,6, got '{text}'") from None


def main(argv: list[str] | None = None) -> int:
    """Parse, tune, print."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    from sphere.tuning.options import TuneOptions
    from sphere.tuning.trials import format_trials
    from sphere.tuning.tune import tune

    names = [field.name for field in dataclasses.fields(TuneOptions)]
    options = TuneOptions(**{name: getattr(arguments, name) for name in names})
    config = RunConfig(**{name: getattr(arguments, name) for name in SETTINGS})
    tuned = tune(config, options, shlex.join([*PROGRAM, "tune", *words]))
    print(f"\n{format_trials(tuned.trials)}")
    print(f"\nBest: trial {tuned.best['trial']}. Tables and figures: {tuned.folder}")
    print(f"Hyperparameters: {tuned.path}")
    return 0
