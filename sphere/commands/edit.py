"""Edit a model sequentially, in batches, and score what the edits did.

With no flags at all: 40 facts of the embedded starter set, in batches of 20, into the embedded default model, by
AlphaEdit with the SPHERE projection. Everything lands in

    <output_dir>/<alg_name>/<model>/<ds_name>_weight_data_batch_<num_edits>_<beta_hse>_<alpha>/

    run.json          the full configuration, and the command
    edit_<n>          weights of the edited layers after n edits (edit_0: the original ones)
    batches.jsonl     what each batch did to each layer
    tensorboard/      the same, with --tensorboard
    resume*           the last finished batch; may be removed when the run is complete
    summary/          scores of the unedited model and of every checkpoint

--beta_hse=0 runs the plain method, without SPHERE. A run that was stopped, by whatever, goes on with the same flags and
--continue_from_run, to the same weights bit for bit. --continue RUN --facts MORE adds facts to a run.

Examples:
    sphere edit
    sphere edit --alg_name=MEMIT --beta_hse=0
    sphere edit --model_name=./Qwen2.5-7B-Instruct --hparams_fname=Qwen2.5-7B.json \\
        --ds_name=mcf --dataset_size_limit=5000 --num_edits=100

`python -m experiments.evaluate` is the same command, in a checkout.
"""

from __future__ import annotations

import argparse

from sphere.commands.common import (
    add_run_settings,
    add_scoring_flags,
    answer_options,
    config_of,
    exact_match_facts,
    generation_interval,
    given_settings,
    make_parser,
    scored_facts,
)
from sphere.errors import SphereError


def parser() -> argparse.ArgumentParser:
    """The flags; those that decide the run are the fields of `sphere.runs.config.RunConfig`."""
    parser = make_parser(__doc__, "sphere edit")
    groups = add_run_settings(parser)
    groups["editing"].add_argument(
        "--dry_run",
        action="store_true",
        help="print what the run will take in memory and time, loading no weights, and stop (`sphere plan`)",
    )
    groups["editing"].add_argument(
        "--list_methods",
        action="store_true",
        help="print every method with its reference and defaults, and stop (`sphere methods`)",
    )
    groups["scoring"].add_argument(
        "--skip_scoring", action="store_true", help="edit only; `sphere score` scores later"
    )
    add_scoring_flags(groups["scoring"])
    groups["output"].add_argument(
        "--continue",
        dest="continued_run",
        metavar="RUN",
        default=None,
        help="go on with this run's folder, with the further facts of --facts; the run's own settings hold",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, edit, score, print."""
    flags = parser()
    arguments = flags.parse_args(argv)
    config = config_of(arguments)
    if arguments.list_methods:
        from sphere.runs.method_list import describe_methods

        print(describe_methods(config.hparams_dir))
        return 0
    if arguments.dry_run and arguments.continued_run:
        raise SphereError(
            "The plan is that of a new run, not of one that is continued: leave one of the two out.",
            argument=("dry_run", "continue"),
        )
    answers, sample = answer_options(arguments), scored_facts(arguments)  # before hours of editing
    if arguments.dry_run:
        from sphere.runs.plan import describe_run

        print(describe_run(config))
        return 0
    if arguments.continued_run:
        from sphere.runs.more_facts import continue_run

        run, config = continue_run(arguments.continued_run, given_settings(flags, argv))
    else:
        from sphere.runs.run import execute

        run = execute(config)
    say = print if run.processes.main else lambda *_: None
    say(f"\nWeights and log: {run.folder}")
    if arguments.skip_scoring:
        return 0
    from sphere.data.records import load_records
    from sphere.evaluation.evaluate_run import evaluate_run
    from sphere.evaluation.further_tables import format_summary

    run.editor.revert()
    interval = generation_interval(arguments)
    summary = evaluate_run(
        run.model,
        run.tokenizer,
        run.folder,
        run.records,
        generation_interval=interval,
        exact_match_facts=exact_match_facts(arguments),
        answers=answers,
        scored_facts=sample,
        data_dir=config.data_dir,
        dataset=load_records(config.ds_name, config.data_dir) if interval and not config.facts else None,
        notes=run.notes,
        passes=config.passes,
        seed=config.seed,
        processes=run.processes,
    )
    say(format_summary(summary))
    for note in run.notes.values():
        say(f"Note: {note}")
    say(f"\nScores: {run.folder / 'summary' / 'summary.json'}")
    return 0
