"""Seconds per edit of the editing methods side by side, on the default model.

    python -m benchmarks.editing_methods                                  # AlphaEdit and UltraEdit, 10 minutes
    python -m benchmarks.editing_methods --methods AlphaEdit MEMIT UltraEdit --n 100
    python -m benchmarks.editing_methods --n 4 --num_edits 2 --steps 2    # a minute, to see it run

The methods take turns batch by batch, each on weights of its own, so that a busy machine slows all alike. Each has its
shipped hyperparameters and the SPHERE hook (`--beta_hse 0`: without) and the same context templates. A row compares the
first method of `--methods` ("plain") with one of the others ("fast"): the median over the batches of a batch's seconds,
divided by its edits; over three batches or more, what a method makes once (second moments, projectors) does not show.
The goal for UltraEdit, which seeks no target values, is 20.

`--output benchmarks/results.md` puts the rows into a section of their own there.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.__main__ import kind_of, section, write_section
from benchmarks.common import Comparison, benchmark_parser, device_of, finish, time_of
from benchmarks.models import default_model, hparams_of
from sphere.commands.common import DATA_FLAGS, add_settings, positive_int, run_cli
from sphere.data.records import load_records
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.methods import available_methods
from sphere.models import DEFAULT_MODEL
from sphere.requests import EditRequest
from sphere.values.context_templates import generate_context_templates

GOALS = {"UltraEdit": 20.0}
EXPLANATION = f"""\
Editing methods on {DEFAULT_MODEL}, taking turns batch by batch, each on weights of its own: seconds per edit of the
first ("plain") and of another ("fast"), medians over the batches."""


class Contender:
    """A method with weights of its own: the model shows them while it edits, and the unedited ones otherwise."""

    def __init__(self, editor: Editor, device: torch.device) -> None:
        self.editor, self.device = editor, device
        self.unedited = self.edited = editor.weights.snapshot()
        self.seconds: list[float] = []  # per edit, one per batch

    def take(self, batch: Sequence[EditRequest]) -> None:
        """Edit a batch."""
        self.editor.weights.restore(self.edited)
        taken, _ = time_of(lambda: self.editor.edit(batch), self.device)
        self.seconds.append(taken / len(batch))
        self.edited = self.editor.weights.snapshot()
        self.editor.weights.restore(self.unedited)


def make_contenders(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Contender]:
    """One per method, with its shipped hyperparameters."""
    device, templates = device_of(args), generate_context_templates(model, tokenizer, args.seed)
    found = {}
    for name in args.methods:
        hparams = hparams_of(DEFAULT_MODEL, name)
        if args.steps and hasattr(hparams, "v_num_grad_steps"):
            hparams = dataclasses.replace(hparams, v_num_grad_steps=args.steps)
        editor = Editor(
            model,
            tokenizer,
            name,
            hparams,
            beta_hse=args.beta_hse,
            seed=args.seed,
            model_label=DEFAULT_MODEL,
            stats_dir=args.stats_dir,
            progress=False,
            context_templates=templates,
        )
        found[name] = Contender(editor, device)
    return found


def measure(contenders: dict[str, Contender], args: argparse.Namespace) -> list[Comparison]:
    """All rows; the model is left unedited."""
    requests = [r.request for r in load_records(args.ds_name, args.data_dir, args.dataset_size_limit)]
    batches = [requests[i : i + args.num_edits] for i in range(0, len(requests), args.num_edits)]
    for batch in tqdm(batches, desc="editing methods", unit="batch"):
        for contender in contenders.values():
            contender.take(batch)
    sizes = f"{len(requests)} edits of {args.ds_name} in batches of {args.num_edits}"
    (first, reference), *others = [(n, statistics.median(c.seconds)) for n, c in contenders.items()]
    return [
        Comparison(f"{name} beside {first}", sizes, reference, seconds, None, goal=GOALS.get(name))
        for name, seconds in others
    ]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = benchmark_parser(__doc__, turns=None)
    add_settings(parser, DATA_FLAGS, dataset_size_limit={"default": 60})
    parser.add_argument(
        "--n",
        dest="dataset_size_limit",
        type=positive_int,
        default=argparse.SUPPRESS,
        help="short for --dataset_size_limit: edits in all",
    )
    parser.add_argument("--num_edits", type=positive_int, default=20, help="edits per batch")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(available_methods()),
        default=["AlphaEdit", "UltraEdit"],
        help="the first is what the others are compared with",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=None, help="v_num_grad_steps (default: each method's own)"
    )
    parser.add_argument("--beta_hse", type=float, default=0.5, help="of the SPHERE hook; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the context templates")
    parser.add_argument("--stats_dir", default="data/stats", help="where second moments are kept")
    parser.add_argument(
        "--output", type=Path, default=None, help="also write the rows into a section of this file"
    )
    return parser


def command_of(args: argparse.Namespace) -> str:
    """The command that was run, without what names files and folders."""
    flags = {
        "device": args.device,
        "methods": " ".join(args.methods),
        "ds_name": args.ds_name,
        "n": args.dataset_size_limit,
        "num_edits": args.num_edits,
        "steps": args.steps,
        "beta_hse": args.beta_hse,
    }
    given = [f"--{name} {value}" for name, value in flags.items() if value is not None]
    return " ".join(["python -m benchmarks.editing_methods", *given])


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code is 1 where a goal was missed."""
    args = parser().parse_args(argv)
    if len(set(args.methods)) < 2:
        raise SphereError(
            "--methods takes two or more different methods: the first and what is compared with it."
        )
    device, begin = device_of(args), time.perf_counter()
    model, tokenizer, _ = default_model(device)
    rows = measure(make_contenders(model, tokenizer, args), args)
    if args.output:
        body = section(command_of(args), device, rows, time.perf_counter() - begin)
        write_section(args.output, f"Editing methods ({kind_of(device)})", f"{EXPLANATION}\n\n{body}")
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
