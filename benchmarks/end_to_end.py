"""The default model edited end to end by AlphaEdit with SPHERE: `sphere.Editor` beside the plain loop, stage by stage.

    python -m benchmarks.end_to_end --products model bfloat16           # 50 minutes, nearly all of it the plain way
    python -m benchmarks.end_to_end --plain_batches 1
    python -m benchmarks.end_to_end --ds_name mcf --data_dir <folder>
    python -m benchmarks.end_to_end --n 4 --num_edits 2 --steps 2       # a minute, to see it run
    python -m benchmarks.end_to_end --device cuda                       # the same model on a GPU

The plain stack is `benchmarks/plain/editing.py`: one request and one sequence at a time through the whole model, dense
matrices. The two take turns batch by batch, each on weights of its own, with the same context templates. Seconds are
per edit; each stage's are without those of the stages within it, so that they add up to the total:

    target values z         the search for z
    keys and residuals      all keys and outputs of layers; for the plain stack also those after a batch, for its cache
    solve                   AlphaEdit's update R X^T, and what is kept of the batch's keys for later ones
    projection              the SPHERE hook
    writing and the rest    everything else

The projectors P, made once, are a row of their own in seconds, outside the total. Second moments are taken from the
cache by both stacks (and computed, unmeasured, where they are missing); loading and scoring do not count either.

The difference of z is the largest of the first batch's, relative to its norm; of the projectors, the largest of a
layer's P; of the total, the largest over the edited weights of ||W_fast - W_plain|| / ||W_plain - W_0|| after the
batches of the plain stack. After those, both models are scored on the facts edited so far.

`--output benchmarks/results.md` puts the rows into a section of their own there.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import benchmarks.plain.editing as plain_editing
from benchmarks.common import Comparison, device_of, finish, relative, time_of
from benchmarks.editing_runs import batches_of, command_of, editing_parser, write_rows
from benchmarks.models import METHOD, default_model
from benchmarks.plain import projection as plain_projection
from benchmarks.plain import solves as plain_solves
from benchmarks.stages import Place, StageClock, timed
from sphere.commands.common import positive_int, run_cli
from sphere.data.records import Record
from sphere.editor import Editor
from sphere.evaluation.scoring import RecordScorer
from sphere.evaluation.summary import SCORES, summarise
from sphere.forward.matmul_dtype import MATMUL_DTYPES
from sphere.forward.passes import PassOptions
from sphere.hparams import HParams
from sphere.methods import Services
from sphere.methods.alphaedit import AlphaEdit
from sphere.models import DEFAULT_MODEL
from sphere.rules import Sphere
from sphere.values.compute_ks import ActivationsPass
from sphere.values.context_templates import generate_context_templates
from sphere.weights import EditedWeights

BETA_HSE, ALPHA, SEED = 0.5, 0.5, 0
GOAL = 10.0  # of the total

Z, KEYS, SOLVE, PROJECTION = "target values z", "keys and residuals", "solve", "projection"
REST, TOTAL = "writing and the rest", "total"
STAGES = (Z, KEYS, SOLVE, PROJECTION, REST)
FAST_PLACES = (
    Place(Services, "compute_z", Z),
    Place(Services, "activations", KEYS),
    Place(ActivationsPass, "compute_ks", KEYS),
    Place(ActivationsPass, "outputs", KEYS),
    Place(AlphaEdit, "updates", SOLVE),  # what the stages within it leave of it
    Place(Sphere, "apply", PROJECTION),
)
PLAIN_PLACES = (
    Place(plain_editing, "plain_target_values", Z),
    Place(plain_editing.PlainEditor, "keys", KEYS),
    Place(plain_editing.PlainEditor, "outputs", KEYS),
    Place(plain_editing.PlainEditor, "solve", SOLVE),
    Place(plain_editing.PlainEditor, "remember", SOLVE),
    Place(plain_projection, "project_update", PROJECTION),
)
EXPLANATION = f"""\
AlphaEdit with SPHERE (beta_hse {BETA_HSE}, alpha {ALPHA}) on {DEFAULT_MODEL}: `sphere.Editor` (fast) and the loop in
`benchmarks/plain/editing.py` (plain: one request and one sequence at a time through the whole model, dense matrices),
taking turns batch by batch. Seconds per edit, but for the projectors, which are made once and are outside the total.
Second moments are taken from the cache by both. The total's difference is the largest over the edited weights of
||W_fast - W_plain|| / ||W_plain - W_0||; success is in percent."""


@dataclass
class Stack:
    """One way of editing, with weights of its own: the model shows those of the stack whose turn it is.

    Attributes:
        edit: writes a batch of requests into the model.
        weights: access to the model's weights.
        places: the functions that make up its stages.
        clock: what they have taken so far.
        projectors_seconds: what its projectors took.
        projectors: layer -> P (in x in).
        state: its weights as they stand, by name.
        n_edits: edits so far.
    """

    edit: Callable[..., Any]
    weights: EditedWeights
    places: tuple[Place, ...]
    clock: StageClock
    projectors_seconds: float
    projectors: dict[int, Tensor]
    state: dict[str, Tensor] = field(init=False)
    n_edits: int = 0

    def __post_init__(self) -> None:
        self.state = self.weights.snapshot()

    def take(self, batch: Sequence[Record]) -> None:
        """Edit a batch on the stack's own weights."""
        self.show()
        requests = [record.request for record in batch]
        with timed(self.places, self.clock), self.clock.stage(REST):
            self.edit(requests)
        self.state = self.weights.snapshot()
        self.n_edits += len(batch)

    def show(self) -> None:
        """Put the stack's weights into the model."""
        self.weights.restore(self.state)

    def per_edit(self, stage: str) -> float:
        """Seconds of a stage."""
        return self.clock.seconds[stage] / self.n_edits

    @property
    def total(self) -> float:
        """Seconds of an edit."""
        return sum(map(self.per_edit, STAGES))


@dataclass(frozen=True)
class Outcome:
    """A stack's state after the batches that all stacks have edited.

    Attributes:
        state: its weights by name.
        success: metric -> percent, on the facts edited so far.
    """

    state: dict[str, Tensor]
    success: dict[str, float]


def make_editors(model: Any, tokenizer: Any, hparams: HParams, args: argparse.Namespace) -> list[Editor]:
    """An editor per type of products; their second moments are at hand."""
    options: dict[str, Any] = {
        "beta_hse": BETA_HSE,
        "alpha": ALPHA,
        "seed": SEED,
        "model_label": DEFAULT_MODEL,
        "stats_dir": args.stats_dir,
        "progress": False,
        "context_templates": generate_context_templates(model, tokenizer, SEED),
    }
    editors = [
        Editor(
            model,
            tokenizer,
            METHOD,
            hparams,
            passes=PassOptions(z_matmul_dtype=MATMUL_DTYPES[name]),
            **options,
        )
        for name in args.products
    ]
    for editor in editors:
        for layer in hparams.layers:
            editor.services.second_moment(layer)
    return editors


def fast_stack(editor: Editor, device: torch.device) -> Stack:
    """The editor as it is."""
    assert isinstance(editor.method, AlphaEdit)
    seconds, _ = time_of(editor.method.prepare, device)
    dense = {
        layer: projector.apply(torch.eye(len(projector.basis)).to(projector.basis))
        for layer, projector in editor.method.projectors.items()
    }
    return Stack(editor.edit, editor.weights, FAST_PLACES, StageClock(device, [Z]), seconds, dense)


def plain_stack(editor: Editor, device: torch.device) -> Stack:
    """The plain loop, with the model, the templates and the second moments of an editor."""
    edited, services, hparams = editor.edited, editor.services, editor.method.hparams

    def projectors() -> dict[int, Tensor]:
        return {
            layer: plain_solves.projector(services.second_moment(layer), hparams.nullspace_threshold)
            for layer in hparams.layers
        }

    seconds, dense = time_of(projectors, device)
    plain = plain_editing.PlainEditor(
        edited.model,
        edited.tokenizer,
        hparams,
        services.context_templates,
        dense,
        beta_hse=BETA_HSE,
        alpha=ALPHA,
    )
    return Stack(plain.edit, plain.weights, PLAIN_PLACES, StageClock(device, [Z]), seconds, dense)


def take_turns(stacks: Sequence[Stack], batches: Sequence[Sequence[Record]]) -> None:
    """Each batch by each stack, so that a busy machine slows all alike."""
    for batch in tqdm(batches, desc="end to end", unit="batch", disable=not batches):
        for stack in stacks:
            stack.take(batch)


def outcome(stack: Stack, scorer: RecordScorer, records: Sequence[Record]) -> Outcome:
    """The stack's weights, and their scores on the records edited so far."""
    stack.show()
    summary = summarise(scorer.score(records, progress=False))
    names = SCORES[summary["kind"]]["score"]
    return Outcome(stack.state, {name: summary[name]["mean"] for name in names if name in summary})


def changes_differ(
    fast: Mapping[str, Tensor], plain: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> float:
    """Largest over the weights of ||W_fast - W_plain|| / ||W_plain - W_0||."""
    return max(
        relative(fast[name].double() - before.double(), plain[name].double() - before.double())
        for name, before in original.items()
    )


def compare_success(fast: Mapping[str, float], plain: Mapping[str, float]) -> str:
    """Both ways' metrics in words."""
    parts = [
        f"{name.replace('_', ' ')} {value:.1f} (plain {plain[name]:.1f})" for name, value in fast.items()
    ]
    largest = max(abs(value - plain[name]) for name, value in fast.items())
    return f"{', '.join(parts)}: at most {largest:.1f} points apart"


def projector_row(fast: Stack, plain: Stack) -> Comparison:
    """What is made once, before the first batch."""
    return Comparison(
        "null-space projectors, once",
        f"{len(plain.projectors)} layers, in {len(next(iter(plain.projectors.values())))}",
        plain.projectors_seconds,
        fast.projectors_seconds,
        max(relative(fast.projectors[layer], p) for layer, p in plain.projectors.items()),
        note="not in the total",
    )


def stage_row(stage: str, fast: Stack, plain: Stack, label: str, sizes: str) -> Comparison:
    """Seconds per edit of one stage."""
    taken = plain.per_edit(stage), fast.per_edit(stage)
    shares = [100 * seconds / stack.total for seconds, stack in zip(taken, (plain, fast), strict=True)]
    note = f"{shares[0]:.0f} % of the plain total, {shares[1]:.0f} % of the fast one"
    return Comparison(stage + label, sizes, *taken, z_differs(fast, plain) if stage == Z else None, note=note)


def z_differs(fast: Stack, plain: Stack) -> float:
    """Largest relative difference of a request's z in the first batch, which both find on the unedited weights."""
    z, expected = (stack.clock.first[Z].z for stack in (fast, plain))  # n x d each
    return max(relative(x, y) for x, y in zip(z, expected, strict=True))


def sizes_of(fast: Stack, plain: Stack, args: argparse.Namespace, steps: int) -> str:
    """How much is edited how."""
    part = "" if plain.n_edits == fast.n_edits else f", plain the first {plain.n_edits}"
    return f"{fast.n_edits} edits of {args.ds_name} in batches of {args.num_edits}{part}, {steps} steps"


def measure(model: Any, tokenizer: Any, hparams: HParams, args: argparse.Namespace) -> list[Comparison]:
    """All rows; the model is left with the weights of one of the stacks."""
    device = device_of(args)
    batches = batches_of(args)
    common = batches[: args.plain_batches]
    editors = make_editors(model, tokenizer, hparams, args)
    fasts, plain = [fast_stack(editor, device) for editor in editors], plain_stack(editors[0], device)
    original = plain.state
    take_turns([plain, *fasts], common)
    scorer, edited = RecordScorer(model, tokenizer), [record for batch in common for record in batch]
    expected, *found = [outcome(stack, scorer, edited) for stack in (plain, *fasts)]
    take_turns(fasts, batches[len(common) :])
    rows = [projector_row(fasts[0], plain)]
    for fast, products, result in zip(fasts, args.products, found, strict=True):
        label = f", products in {products}" if products != "model" else ""
        sizes = sizes_of(fast, plain, args, hparams.v_num_grad_steps)
        rows += [stage_row(stage, fast, plain, label, sizes) for stage in STAGES]
        difference = changes_differ(result.state, expected.state, original)
        note = compare_success(result.success, expected.success)
        rows.append(
            Comparison(TOTAL + label, sizes, plain.total, fast.total, difference, goal=GOAL, note=note)
        )
    return [dataclasses.replace(row, name=f"end to end: {row.name}") for row in rows]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = editing_parser(__doc__, n=100)
    parser.add_argument(
        "--plain_batches",
        type=positive_int,
        default=None,
        help="edit only the first so many batches the plain way, too, and compare the results after these "
        "(default: all)",
    )
    parser.add_argument(
        "--products",
        choices=list(MATMUL_DTYPES),
        nargs="+",
        default=["model"],
        help="types that the fast way multiplies in while z is sought, each a run of its own",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code is 1 where the goal was missed."""
    args = parser().parse_args(argv)
    begin = time.perf_counter()
    model, tokenizer, hparams = default_model(device_of(args))
    if args.steps:
        hparams = dataclasses.replace(hparams, v_num_grad_steps=args.steps)
    rows = measure(model, tokenizer, hparams, args)
    command = command_of("end_to_end", args, ("plain_batches", "products"))
    write_rows(args, "End to end", EXPLANATION, command, rows, time.perf_counter() - begin)
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
