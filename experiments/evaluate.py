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
--continue_from_run, to the same weights bit for bit.

Examples:
    python -m experiments.evaluate
    python -m experiments.evaluate --alg_name=MEMIT --beta_hse=0
    python -m experiments.evaluate --model_name=./Qwen2.5-7B-Instruct --hparams_fname=Qwen2.5-7B.json \\
        --ds_name=mcf --dataset_size_limit=5000 --num_edits=100
"""

from __future__ import annotations

import argparse
import dataclasses

from sphere.commands.common import add_data_flags, add_model_flags, make_parser, positive_int, run_cli


def parser() -> argparse.ArgumentParser:
    """The flags; those that decide the run have the names of `sphere.runs.config.RunConfig`."""
    parser = make_parser(__doc__)
    _add_editing_flags(parser)
    add_model_flags(parser)
    add_data_flags(parser, limit=40)
    _add_output_flags(parser)
    _add_scoring_and_machine_flags(parser)
    return parser


def _add_editing_flags(parser: argparse.ArgumentParser) -> None:
    edit = parser.add_argument_group("editing")
    edit.add_argument("--alg_name", default="AlphaEdit", help="the method; --list_methods shows them all")
    edit.add_argument(
        "--hparams_fname",
        default=None,
        help="file in <hparams_dir>/<alg_name>/ (default: the model's name + .json)",
    )
    edit.add_argument("--hparams_dir", default="hparams", help="where hyperparameter files are")
    edit.add_argument("--num_edits", type=positive_int, default=20, help="edits per batch")
    edit.add_argument(
        "--beta_hse",
        type=float,
        default=0.5,
        help="SPHERE: cumulative ratio that decides how many directions are principal; 0 switches it off",
    )
    edit.add_argument(
        "--alpha",
        type=float,
        default=None,
        help="SPHERE: suppression strength (default: the paper's, 0.5 for AlphaEdit and 0.8 for the others)",
    )
    edit.add_argument(
        "--on_breakdown",
        choices=("stop", "continue"),
        default="stop",
        help="whether an absurdly large update stops the run or is written, with a warning; what is not finite always "
        "stops it",
    )
    edit.add_argument("--seed", type=int, default=0, help="of everything that is sampled")
    edit.add_argument(
        "--dry_run",
        action="store_true",
        help="print what the run will take in memory and time, loading no weights, and stop",
    )
    edit.add_argument(
        "--list_methods",
        action="store_true",
        help="print every method with its reference and defaults, and stop",
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", default="Edited_Weight", help="where runs are written")
    out.add_argument("--stats_dir", default="data/stats", help="where second moments are kept for later runs")
    out.add_argument("--cache_dir", default="data/cache", help="where --use_cache keeps target values")
    out.add_argument(
        "--checkpoints",
        default="ends",
        help="which weights to save besides edit_0: ends (first and last batch), all, or numbers of edits: 100,300",
    )
    out.add_argument(
        "--continue_from_run", action="store_true", help="go on with the run of these flags where it stopped"
    )
    out.add_argument("--overwrite", action="store_true", help="replace a run that is already there")
    out.add_argument(
        "--log_energy_every",
        type=int,
        default=1,
        help="log hyperspherical energy, principal share and conditioning of the edited weights after every so-many-th "
        "batch; 0: never",
    )
    out.add_argument(
        "--tensorboard", action="store_true", help="also log each batch's figures as TensorBoard events"
    )


def _add_scoring_and_machine_flags(parser: argparse.ArgumentParser) -> None:
    score = parser.add_argument_group("scoring")
    score.add_argument(
        "--skip_scoring", action="store_true", help="edit only; scripts.evaluate_each_epoch scores later"
    )
    score.add_argument(
        "--skip_generation_tests", action="store_true", help="score probabilities only, generate no text"
    )
    score.add_argument(
        "--generation_test_interval",
        type=int,
        default=0,
        help="generate text for every so-many-th case in the order of editing, from the first; 0 or below: never",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--conserve_memory",
        action="store_true",
        help="keep second moments, projectors and original weights off the GPU",
    )
    machine.add_argument(
        "--use_cache", action="store_true", help="keep target values z on disk for methods that share them"
    )
    machine.add_argument(
        "--batch_tokens",
        type=positive_int,
        default=None,
        help="tokens in one forward pass, of editing and of scoring; less needs less memory (default: what suits the "
        "device and the kind of pass)",
    )
    machine.add_argument(
        "--z_matmul_dtype",
        metavar="TYPE",
        default="model",
        help="model or bfloat16, the type in which the layers above z multiply while z is sought; its state stays in "
        "float32. bfloat16 is faster for a float32 model where the processor knows it (default: the model's)",
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, edit, score, print."""
    arguments = parser().parse_args(argv)
    if arguments.list_methods:
        from sphere.runs.method_list import describe_methods

        print(describe_methods(arguments.hparams_dir))
        return 0
    from sphere.runs.run import RunConfig, execute

    fields = {f.name for f in dataclasses.fields(RunConfig)}
    values = {k: v for k, v in vars(arguments).items() if k in fields}
    config = RunConfig(**{**values, "data_dir": str(values["data_dir"])})
    if arguments.dry_run:
        from sphere.runs.plan import describe_run

        print(describe_run(config))
        return 0
    run = execute(config)
    say = print if run.processes.main else lambda *_: None
    say(f"\nWeights and log: {run.folder}")
    if arguments.skip_scoring:
        return 0
    from sphere.data.records import load_records
    from sphere.evaluation.evaluate_run import evaluate_run
    from sphere.evaluation.summary import format_table

    run.editor.revert()
    interval = 0 if arguments.skip_generation_tests else max(arguments.generation_test_interval, 0)
    summary = evaluate_run(
        run.model,
        run.tokenizer,
        run.folder,
        run.records,
        generation_interval=interval,
        data_dir=arguments.data_dir,
        dataset=load_records(arguments.ds_name, arguments.data_dir) if interval else None,
        passes=config.passes,
        seed=arguments.seed,
        processes=run.processes,
    )
    say(format_table(summary))
    say(f"\nScores: {run.folder / 'summary' / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
