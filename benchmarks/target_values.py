"""Target values z of a batch at once, beside one request at a time through the whole model.

    python -m benchmarks.target_values
    python -m benchmarks.target_values --n 20 --products model
    python -m benchmarks.target_values --device cuda     # random Qwen2.5-7B

The plain way optimises a few requests of the batch, one by one; seconds and memory are per request. The difference is
the largest of these requests' z, relative to its norm. The largest batch is run twice more, for operations and memory.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Comparison,
    Measured,
    benchmark_parser,
    compare,
    device_of,
    finish,
    peak_of,
    relative,
)
from benchmarks.keys import TEMPLATES
from benchmarks.models import benchmark_model
from benchmarks.plain.target_values import plain_target_values
from sphere.commands.common import positive_int, run_cli
from sphere.data.records import load_records
from sphere.forward.layers import LayerStack
from sphere.forward.matmul_dtype import MATMUL_DTYPES
from sphere.hparams import TargetHParams
from sphere.requests import EditRequest
from sphere.runs.rates import measure_rates
from sphere.values.compute_z import compute_z

# Rows by default: (requests in a batch, type that the fast way multiplies in); on a GPU, and elsewhere.
ON_GPU = [(100, "model")]
ELSEWHERE = [(50, "model"), (50, "bfloat16"), (100, "bfloat16")]
GOALS = {(20, "model"): 6.0, (50, "bfloat16"): 10.0}  # wanted ratios, on a CPU


@dataclass(frozen=True)
class Batch:
    """A batch of requests, and the plain and the fast way to find their z.

    Attributes:
        chosen: indices of the requests that the plain way takes.
        products: type that the fast way multiplies in; None: the model's own.
        batch_tokens: of a pass of the fast way.
    """

    stack: LayerStack
    tokenizer: Any
    hparams: TargetHParams
    requests: Sequence[EditRequest]
    chosen: Sequence[int]
    products: torch.dtype | None
    batch_tokens: int

    def plain(self, chosen: Sequence[int]) -> Tensor:
        """z of some requests, (n x d)."""
        some = [self.requests[i] for i in chosen]
        return plain_target_values(self.stack.model, self.tokenizer, some, TEMPLATES, self.hparams).z

    def fast(self) -> Tensor:
        """z of all requests, of which those of the plain way are returned."""
        found = compute_z(
            self.stack,
            self.tokenizer,
            self.requests,
            TEMPLATES,
            self.hparams,
            batch_tokens=self.batch_tokens,
            matmul_dtype=self.products,
            progress=False,
        )
        return found.z[self.chosen]

    def operations(self) -> int:
        """Floating-point operations of the fast way, run once, with attention as plain products.

        PyTorch's count of its fused kernels on a GPU refuses heads that share keys.
        """
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.fast()
        return counter.get_total_flops()


def measure(batch: Batch, label: str, turns: int, goal: float | None, counted: bool) -> Comparison:
    """One row, per request.

    Args:
        label: of the type of products.
        counted: also find the operations of the fast way and the memory that both take.
    """
    device = batch.stack.device
    n, few, steps = len(batch.requests), len(batch.chosen), batch.hparams.v_num_grad_steps
    operations = batch.operations() if counted else None
    plain_bytes = peak_of(lambda: batch.plain(batch.chosen[:1]), device) if counted else None
    fast_bytes = peak_of(batch.fast, device) if counted else None

    def say(measured: Measured) -> str:
        words = f"plain: {few} of the requests"
        if operations is None:
            return words
        dtype = batch.products or batch.stack.model.dtype
        most = max(measure_rates(str(device), dtype)["model"] for _ in range(3))
        rate = operations / measured.median
        return (
            f"{words}, its memory is that of one; fast: {operations / n / steps / 1e9:.1f} GFLOP per request and "
            f"step, {rate / 1e9:.0f} GFLOP/s, {100 * rate / most:.0f} % of the rate of square products"
        )

    row = compare(
        "target values z, per request" + label,
        f"{n} requests in {sum(map(len, TEMPLATES))} templates, {steps} steps",
        lambda: batch.plain(batch.chosen),
        batch.fast,
        difference=lambda a, b: max(relative(x, y) for x, y in zip(a, b, strict=True)),
        device=device,
        turns=turns,
        warm_plain=False,
        warm_fast=False,
        goal=goal,
        note=say,
    )
    return dataclasses.replace(
        row,
        plain_seconds=row.plain_seconds / few,
        fast_seconds=row.fast_seconds / n,
        plain_bytes=plain_bytes,
        fast_bytes=None if fast_bytes is None else fast_bytes // n,
    )


def runs_of(args: argparse.Namespace, device: torch.device) -> list[tuple[int, str]]:
    """Requests and type of products of each row: those asked for, the device's own where none are."""
    defaults = ON_GPU if device.type == "cuda" else ELSEWHERE
    if args.n is None and args.products is None:
        return defaults
    counts = args.n or dict.fromkeys(n for n, _ in defaults)
    kinds = args.products or dict.fromkeys(products for _, products in defaults)
    return list(product(counts, kinds))


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__, turns=1)
    parser.add_argument("--n", type=positive_int, nargs="+", default=None, help="requests of a batch")
    parser.add_argument("--few", type=positive_int, default=3, help="requests that the plain way takes")
    parser.add_argument(
        "--steps", type=positive_int, default=None, help="steps (default: as many as in editing)"
    )
    parser.add_argument("--batch_tokens", type=positive_int, default=2048)
    parser.add_argument(
        "--products",
        choices=list(MATMUL_DTYPES),
        nargs="+",
        default=None,
        help="types that the fast way multiplies in",
    )
    args = parser.parse_args(argv)
    device = device_of(args)
    model, tokenizer, hparams = benchmark_model(device)
    if args.steps:
        hparams = dataclasses.replace(hparams, v_num_grad_steps=args.steps)
    stack, runs, rows = LayerStack(model, hparams), runs_of(args, device), []
    for n, products in runs:
        requests = [record.request for record in load_records("starter", "data", n)]
        few = min(args.few, n)
        chosen = list(range(0, n, n // few))[:few]
        kind = MATMUL_DTYPES[products]
        batch = Batch(stack, tokenizer, hparams, requests, chosen, kind, args.batch_tokens)
        label = f", products in {products}" if products != "model" else ""
        goal = GOALS.get((n, products)) if device.type == "cpu" else None
        rows.append(measure(batch, label, args.turns, goal, counted=n == max(n for n, _ in runs)))
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
