"""Score the unedited model and every checkpoint of a run.

With --ds_name: the edits. Writes <weight_folder>/summary/summary.json and prints the table.
Without: the downstream tasks (reasoning, NLI, open- and closed-domain QA). Writes <weight_folder>/rect_eval/ and prints
their table.

Both go on where they were stopped: what is finished is not scored again. `python -m scripts.evaluate_each_epoch` is
the same command, in a checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sphere.commands.common import (
    DATA_FLAGS,
    MODEL_FLAGS,
    add_scoring_flags,
    add_settings,
    answer_options,
    exact_match_facts,
    generation_interval,
    make_parser,
    positive_int,
    scored_facts,
)

if TYPE_CHECKING:
    from sphere.forward.passes import PassOptions


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere score")
    parser.add_argument(
        "--weight_folder", type=Path, required=True, help="a run's folder, as `sphere edit` wrote it"
    )
    parser.add_argument(
        "--only_checkpoints",
        default=None,
        help="score only these: numbers of edits and last, e.g. 0,100,last; 0 is the unedited model, which the scores "
        "of edits always have (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of generation and of the bootstrap intervals")
    add_settings(
        parser,
        (*MODEL_FLAGS, *DATA_FLAGS, "batch_tokens", "conserve_memory"),
        ds_name={"default": None},
        dataset_size_limit={"default": None, "help": "use only the first so many records (default: all)"},
        batch_tokens={"help": "tokens in one forward pass; less needs less memory (default: by device)"},
        conserve_memory={"help": "small forward passes; the original weights are kept off the GPU"},
    )
    add_scoring_flags(parser.add_argument_group("generation (with --ds_name)"))
    downstream = parser.add_argument_group("downstream tasks (without --ds_name)")
    downstream.add_argument(
        "--num_tests", type=positive_int, default=None, help="only the first so many examples of each task"
    )
    downstream.add_argument(
        "--tasks", type=_names, default=None, help="comma-separated names of tasks (default: all four)"
    )
    downstream.add_argument(
        "--task_format",
        choices=("ours", "published"),
        default="ours",
        help="prompts and grading: ours, or as the paper's authors score the tasks",
    )
    downstream.add_argument(
        "--lm_eval_tasks", type=_names, default=None, help="also these tasks of lm-evaluation-harness: a,b,c"
    )
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _passes(args: argparse.Namespace) -> PassOptions:
    from sphere.forward.passes import PassOptions

    return PassOptions(batch_tokens=args.batch_tokens, conserve_memory=args.conserve_memory)


def main(argv: list[str] | None = None) -> int:
    """Parse, score, print."""
    args = parser().parse_args(argv)
    return _downstream(args) if args.ds_name is None else _edits(args)


def _only(args: argparse.Namespace) -> list[int] | None:
    """The numbers of edits to be scored; None: all."""
    from sphere.checkpoints import chosen_checkpoints, list_checkpoints

    there = list_checkpoints(args.weight_folder)
    return None if args.only_checkpoints is None else chosen_checkpoints(there, args.only_checkpoints)


def _edits(args: argparse.Namespace) -> int:
    from sphere.data.records import load_records
    from sphere.distributed import start
    from sphere.evaluation.evaluate_run import evaluate_run
    from sphere.evaluation.further_tables import format_summary
    from sphere.models import load_model
    from sphere.runs.config import OWN_FACTS
    from sphere.runs.facts_file import read_run_facts

    # What is wrong is reported before anything is loaded.
    only, answers, sample = _only(args), answer_options(args), scored_facts(args)
    own = args.ds_name == OWN_FACTS
    if own:
        records, notes = read_run_facts(args.weight_folder)
        records = records[: args.dataset_size_limit]
    else:
        records, notes = load_records(args.ds_name, args.data_dir, args.dataset_size_limit), {}
    processes = start(args.device, args.device_map)
    model, tokenizer = load_model(args.model_name, processes.device, args.dtype, args.device_map)
    interval = generation_interval(args)
    summary = evaluate_run(
        model,
        tokenizer,
        args.weight_folder,
        records,
        generation_interval=interval,
        exact_match_facts=exact_match_facts(args),
        answers=answers,
        scored_facts=sample,
        only=only,
        data_dir=args.data_dir,
        dataset=load_records(args.ds_name, args.data_dir) if interval and not own else None,
        ds_name=args.ds_name,
        notes=notes,
        passes=_passes(args),
        seed=args.seed,
        processes=processes,
    )
    if processes.main:
        print(format_summary(summary))
        print(f"\nScores: {args.weight_folder / 'summary' / 'summary.json'}")
    return 0


def _downstream(args: argparse.Namespace) -> int:
    from sphere.distributed import start
    from sphere.downstream import format_downstream, run_downstream
    from sphere.models import load_model

    only = _only(args)
    processes = start(args.device, args.device_map)
    model, tokenizer = load_model(args.model_name, processes.device, args.dtype, args.device_map)
    with processes.together():
        summary = run_downstream(
            model,
            tokenizer,
            args.weight_folder,
            args.data_dir,
            num_tests=args.num_tests,
            tasks=args.tasks,
            lm_eval_tasks=args.lm_eval_tasks,
            only=only,
            passes=_passes(args),
            processes=processes,
            task_format=args.task_format,
        )
    if processes.main:
        print(format_downstream(summary))
        print(f"\nResults: {args.weight_folder / 'rect_eval'}")
    return 0
