"""A long run of AlphaEdit on a tiny random model: what a batch costs as the edits before it grow in number.

    python -m benchmarks.growth                                   # 15,000 edits, in 4096, on one thread
    python -m benchmarks.growth --n 600 --inp 128 --num_edits 20  # seconds, to see it run
    python -m benchmarks.growth --output benchmarks/results.md    # puts the table into a section there

`sphere.Editor` with SPHERE edits made-up facts into one layer (out 32) of a random Llama of two, and writes the
resume point after every batch, as a run does. z takes two steps, so that what is seen is what depends on the earlier
edits: the solve and what is kept for it. Beyond `in` keys its T is a matrix. From there on the goals are counted,
over windows that hold whole cycles of T's taking in later batches: the mean time of a batch within 20 % from window
to window, the peak of the resident memory within 2 %.

Seconds are the process's own CPU time on one thread, so that other work on the machine counts little. The last resume
point is then taken up by a second editor, in less than a minute, and both edit one more batch: their weights must be
equal bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import string
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.__main__ import write_section
from benchmarks.alphaedit_solve import random_keys
from benchmarks.common import MIB, machine, reset_peak, status_bytes
from sphere.checkpoints import read_resume, write_resume
from sphere.commands.common import make_parser, positive_int, run_cli
from sphere.editor import Editor
from sphere.files import write_json
from sphere.methods.alphaedit import AlphaEdit, AlphaEditHParams
from sphere.methods.sequential_solve import PENDING
from sphere.requests import EditRequest

WIDTH, LAYER, STEPS = 32, 0, 2
MARKS = (1000, 2000, 4000, 8000, 15000)  # rows of the table, beside those around T's becoming a matrix
TIME_GOAL, MEMORY_GOAL, TAKE_UP_GOAL = 1.2, 1.02, 60.0  # largest by smallest window; seconds


@dataclass(frozen=True)
class Batch:
    """What one batch took.

    Attributes:
        n_edits: edits so far, this batch included.
        edit_seconds: CPU time of editing.
        save_seconds: CPU time of T's taking in earlier batches and of the resume point.
        peak: of the resident memory within the batch, without files' pages; None where the system does not tell.
        resident: after the batch.
        state: bytes that the solve keeps of the earlier batches.
        resume: bytes of the resume point.
        matrix: whether T is a matrix.
    """

    n_edits: int
    edit_seconds: float
    save_seconds: float
    peak: int | None
    resident: int | None
    state: int
    resume: int
    matrix: bool

    @property
    def seconds(self) -> float:
        return self.edit_seconds + self.save_seconds


# ---- what is edited ----


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<|end|>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def random_model(inp: int) -> Any:
    """A Llama of two layers whose MLPs are `inp` wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=WIDTH,
        intermediate_size=inp,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def facts(n: int) -> list[EditRequest]:
    """Made-up ones about subjects of five letters."""
    generator, letters = random.Random(0), string.ascii_lowercase
    numbers = generator.sample(range(len(letters) ** 5), n)
    subjects = ["".join(letters[number // 26**i % 26] for i in range(5)) for number in numbers]
    return [
        EditRequest(i, "{} is in", subject.capitalize(), generator.choice(("Rome", "Oslo", "Bonn")), "Paris")
        for i, subject in enumerate(subjects)
    ]


def make_editor(inp: int, moment: Tensor) -> Editor:
    """AlphaEdit with SPHERE on a model of its own, prepared."""
    hparams = AlphaEditHParams(
        layers=[LAYER],
        clamp_norm_factor=1.0,
        v_num_grad_steps=STEPS,
        v_lr=0.1,
        v_loss_layer=1,
        v_weight_decay=0.0,
        kl_factor=0.0,
        mom2_adjustment=True,
        mom2_update_weight=1.0,
        mom2_dataset="self",
        mom2_n_samples=1,
        mom2_dtype="float32",
        nullspace_threshold=float(moment.diagonal().mean()) / 4,
        L2=10.0,
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}",
        mlp_module_tmp="model.layers.{}.mlp",
        attn_module_tmp="model.layers.{}.self_attn",
        ln_f_module="model.norm",
        lm_head_module="lm_head",
    )
    editor = Editor(
        random_model(inp),
        byte_tokenizer(),
        AlphaEdit,
        hparams,
        on_breakdown="continue",
        context_templates=(("{}",),),
        progress=False,
    )
    editor.services.second_moments.set(LAYER, moment)
    editor.method.prepare()
    return editor


# ---- measuring ----


def run_batch(editor: Editor, requests: Sequence[EditRequest], folder: Path) -> Batch:
    """Edit and save one batch."""
    told = reset_peak()
    begin = time.process_time()
    editor.edit(requests)
    edited = time.process_time()
    resume = write_resume(folder, *editor.state())
    saved = time.process_time()
    peak, files = status_bytes("VmHWM"), status_bytes("RssFile")
    solve = editor.method.solves[LAYER]
    return Batch(
        editor.n_edits,
        edited - begin,
        saved - edited,
        peak - files if told and peak is not None and files is not None else None,
        status_bytes("RssAnon"),
        solve.nbytes + sum(block.nbytes for block in solve.key_blocks),
        resume,
        solve.compacted is not None,
    )


def take_up(editor: Editor, folder: Path) -> float:
    """Wall seconds in which an editor takes up a resume point."""
    begin = time.perf_counter()
    point = read_resume(folder)
    assert point is not None
    editor.load_state(*point)
    return time.perf_counter() - begin


def windows_of(batches: Sequence[Batch], cycle: int) -> list[Sequence[Batch]]:
    """Of two cycles each, from where T is a matrix."""
    later, size = [batch for batch in batches if batch.matrix][1:], 2 * cycle
    return [later[i : i + size] for i in range(0, len(later) - size + 1, size)]


def unevenness(windows: Sequence[Sequence[Batch]]) -> dict[str, float]:
    """Largest by smallest window: mean time of a batch, most of memory and of the resume point."""
    measured = {
        "seconds": [statistics.fmean(batch.seconds for batch in window) for window in windows],
        "peak": [max(batch.peak or 0 for batch in window) for window in windows],
        "state": [max(batch.state for batch in window) for window in windows],
        "resume": [max(batch.resume for batch in window) for window in windows],
    }
    return {name: max(values) / min(values) for name, values in measured.items() if min(values, default=0)}


def rows_of(batches: Sequence[Batch], cycle: int) -> list[list[str]]:
    """The table: each row of the two cycles of batches that end there; the last before and the first with a matrix."""
    first = next((i for i, batch in enumerate(batches) if batch.matrix), len(batches))
    marks = {i for i, batch in enumerate(batches) if batch.n_edits in MARKS} | {first, len(batches) - 1}
    rows = []
    for i in sorted(mark for mark in marks if mark < len(batches)):
        start = i if i == first else max(0, i + 1 - 2 * cycle)
        window = [batch for batch in batches[start : i + 1] if i <= first or batch.matrix]
        peaks = [batch.peak for batch in window if batch.peak is not None]
        rows.append(
            [
                f"{batches[i].n_edits}" + (" (T becomes a matrix)" if i == first else ""),
                f"{statistics.fmean(batch.edit_seconds for batch in window):.3f}",
                f"{statistics.fmean(batch.save_seconds for batch in window):.3f}",
                f"{max(batch.state for batch in window) / MIB:.0f}",
                "?" if batches[i].resident is None else f"{batches[i].resident / MIB:.0f}",
                f"{max(peaks) / MIB:.0f}" if peaks else "?",
                f"{max(batch.resume for batch in window) / MIB:.0f}",
            ]
        )
    return rows


def sentences(uneven: dict[str, float], taken_up: float, equal: bool) -> list[str]:
    """What the measurements come to."""
    named = {
        "seconds": f"mean time of a batch (goal {TIME_GOAL})",
        "peak": f"peak of the resident memory (goal {MEMORY_GOAL})",
        "state": "what the solve keeps",
        "resume": "the resume point",
    }
    ratios = [f"{what} {uneven[key]:.3f}" for key, what in named.items() if key in uneven]
    return [
        f"Largest by smallest window of two cycles, once T is a matrix: {'; '.join(ratios) or 'too few batches'}.",
        f"The resume point is taken up in {taken_up:.2f} s of wall time beside loading the model and preparing the "
        f"method; both editors' weights after one more batch are {'equal bit for bit' if equal else 'NOT equal'}.",
    ]


HEADER = ("edits", "editing, s", "saving, s", "state, MiB", "resident, MiB", "peak, MiB", "resume point, MiB")


def section(command: str, rows: Sequence[Sequence[str]], said: Sequence[str], seconds: float) -> str:
    """Markdown of the table and what follows from it."""
    lines = [
        "AlphaEdit with SPHERE on a random Llama of two layers, one of them edited. CPU seconds of a batch on one",
        "thread, means of two cycles of T's taking in later batches; bytes are the most in these batches.",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes.",
        "",
        *(f"- {key}: {value}" for key, value in machine().items()),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|" + "---:|" * (len(HEADER) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {sentence}" for sentence in said),
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--n", type=positive_int, default=15000, help="edits in all")
    parser.add_argument("--num_edits", type=positive_int, default=100, help="edits per batch")
    parser.add_argument("--inp", type=positive_int, default=4096, help="in_features of the edited module")
    parser.add_argument("--json", default=None, help="also write what every batch took to this file")
    parser.add_argument(
        "--output", type=Path, default=None, help="also write the table into a section of this file"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code is 1 where a goal was missed."""
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    keys = random_keys(args.inp, 2 * args.inp, torch.device("cpu"))
    moment = keys @ keys.T / keys.shape[1]
    del keys
    editor, requests = make_editor(args.inp, moment), facts(args.n + args.num_edits)
    parts = [requests[i : i + args.num_edits] for i in range(0, args.n, args.num_edits)]
    one_more = requests[args.n :]
    with tempfile.TemporaryDirectory() as name:
        batches = [run_batch(editor, part, Path(name)) for part in tqdm(parts, desc="batches")]
        second = make_editor(args.inp, moment)
        taken_up = take_up(second, Path(name))
    for each in (editor, second):
        each.edit(one_more)
    weights = editor.final_weights(), second.final_weights()
    equal = all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    cycle = args.inp // PENDING // args.num_edits + 1
    uneven = unevenness(windows_of(batches, cycle))
    said = sentences(uneven, taken_up, equal)
    command = f"python -m benchmarks.growth --n {args.n} --num_edits {args.num_edits} --inp {args.inp}"
    body = section(command, rows_of(batches, cycle), said, time.perf_counter() - begin)
    print(body)
    if args.output:
        write_section(args.output, "Growth (CPU)", body)
    if args.json:
        rows = [dataclasses.asdict(batch) for batch in batches]
        write_json(args.json, {"rows": rows, "uneven": uneven, "taken_up": taken_up, "equal": equal})
    met = (
        uneven.get("seconds", 1.0) <= TIME_GOAL,
        uneven.get("peak", 1.0) <= MEMORY_GOAL,
        taken_up < TAKE_UP_GOAL,
        equal,
    )
    return int(not all(met))


if __name__ == "__main__":
    run_cli(main)
