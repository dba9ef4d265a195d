"""Seconds per edit of the editing methods side by side, on the default model.

    python -m benchmarks.editing_methods                                  # AlphaEdit and UltraEdit, 10 minutes
    python -m benchmarks.editing_methods --methods AlphaEdit MEMIT UltraEdit --n 100
    python -m benchmarks.editing_methods --n 4 --num_edits 2 --steps 2    # a minute, to see it run

The methods take turns batch by batch, each on weights of its own, so that a busy machine slows all alike. Each has its
shipped hyperparameters and the SPHERE hook (`--beta_hse 0`: without) and the same context templates. A row compares the
first method of `--methods` ("plain") with one of the others ("fast"): the median over the batches of a batch's seconds,
divided by its edits; over three batches or more, what a method makes once (second moments, projectors) does not show.
The goal for UltraEdit, which seeks no target values, beside AlphaEdit is 20.

`--output benchmarks/results.md` puts the rows into a section of their own there.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.common import Comparison, device_of, finish, time_of
from benchmarks.editing_runs import batches_of, command_of, editing_parser, write_rows
from benchmarks.models import default_model, hparams_of
from sphere.commands.common import run_cli
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.methods import available_methods
from sphere.models import DEFAULT_MODEL
from sphere.requests import EditRequest
from sphere.values.context_templates import generate_context_templates

GOALS = {("AlphaEdit", "UltraEdit"): 20.0}
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
    batches = [[record.request for record in batch] for batch in batches_of(args)]
    for batch in tqdm(batches, desc="editing methods", unit="batch"):
        for contender in contenders.values():
            contender.take(batch)
    sizes = f"{sum(map(len, batches))} edits of {args.ds_name} in batches of {args.num_edits}"
    (first, reference), *others = [(n, statistics.median(c.seconds)) for n, c in contenders.items()]
    return [
        Comparison(f"{name} beside {first}", sizes, reference, seconds, None, goal=GOALS.get((first, name)))
        for name, seconds in others
    ]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = editing_parser(__doc__, n=60)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(available_methods()),
        default=["AlphaEdit", "UltraEdit"],
        help="the first is what the others are compared with",
    )
    parser.add_argument("--beta_hse", type=float, default=0.5, help="of the SPHERE hook; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the context templates")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code is 1 where a goal was missed."""
    args = parser().parse_args(argv)
    if len(set(args.methods)) < 2:
        raise SphereError(
            "--methods takes two or more different methods: the first and what is compared with it."
        )
    begin = time.perf_counter()
    model, tokenizer, _ = default_model(device_of(args))
    rows = measure(make_contenders(model, tokenizer, args), args)
    command = command_of("editing_methods", args, ("methods", "beta_hse"))
    write_rows(args, "Editing methods", EXPLANATION, command, rows, time.perf_counter() - begin)
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
