"""Target values z of a batch at once, beside one request at a time through the whole model.

    python -m benchmarks.target_values
    python -m benchmarks.target_values --n 20 --products model
    python -m benchmarks.target_values --device cuda     # random Qwen2.5-7B

The plain way optimises a few requests of the batch, one by one; seconds and memory are per request. The difference is
the largest of these requests' z, relative to its norm. The largest batch is run once more, for operations and memory.
"""

from __future__ import annotations

import argparse
import dataclasses
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Measured, Row, benchmark_parser, compare, device_of, finish, peak_of, relative
from benchmarks.keys import TEMPLATES
from benchmarks.models import benchmark_model
from benchmarks.plain.target_values import plain_target_values
from sphere.cli import positive_int, run_cli
from sphere.data import load_records
from sphere.hparams import TargetHParams
from sphere.layers import LayerStack
from sphere.plan import measure_rates
from sphere.run_config import Z_PRODUCTS
from sphere.target_values import compute_target_values

# (requests in a batch, type that the fast way multiplies in) -> wanted ratio, where there is one.
RUNS = {
    "cpu": {(50, "model"): None, (50, "bfloat16"): 10.0, (100, "bfloat16"): None},
    "cuda": {(100, "model"): None},
}


def measure(
    model: Any,
    tokenizer: Any,
    hparams: TargetHParams,
    n: int,
    products: str,
    args: argparse.Namespace,
    counted: bool,
) -> Row:
    """One row, per request; `counted`: run both ways once more, for the operations and the memory they take."""
    stack = LayerStack(model, hparams)
    requests = [record.request for record in load_records("starter", "data", n)]
    few = min(args.few, n)
    chosen = list(range(0, n, n // few))[:few]

    def by_plain(count: int = few) -> Tensor:
        some = [requests[i] for i in chosen[:count]]
        return plain_target_values(model, tokenizer, some, TEMPLATES, hparams).z

    def fast() -> Tensor:
        found = compute_target_values(
            stack,
            tokenizer,
            requests,
            TEMPLATES,
            hparams,
            batch_tokens=args.batch_tokens,
            products=Z_PRODUCTS[products],
            progress=False,
        )
        return found.z[chosen]

    def counting() -> None:
        with FlopCounterMode(display=False) as counter:
            fast()
        operations.append(counter.get_total_flops())

    def say(measured: Measured) -> str:
        words = f"plain: {few} of the requests"
        if not operations:
            return words
        most = max(measure_rates(str(stack.device), kind)["model"] for _ in range(3))
        rate = operations[0] / measured.median
        each = operations[0] / n / hparams.v_num_grad_steps
        return (
            f"{words}, its memory is that of one; fast: {each / 1e9:.1f} GFLOP per request and step, "
            f"{rate / 1e9:.0f} GFLOP/s, {100 * rate / most:.0f} % of the rate of square products"
        )

    kind = Z_PRODUCTS[products] or model.dtype
    operations: list[int] = []
    peaks = [peak_of(way, stack.device) for way in (lambda: by_plain(1), counting)] if counted else [None] * 2
    row = compare(
        "target values z, per request" + (f", products in {products}" if products != "model" else ""),
        f"{n} requests in {sum(map(len, TEMPLATES))} templates, {hparams.v_num_grad_steps} steps",
        by_plain,
        fast,
        difference=lambda a, b: max(relative(x, y) for x, y in zip(a, b, strict=True)),
        device=stack.device,
        turns=args.turns,
        warm_plain=False,
        warm_fast=False,
        goal=RUNS[stack.device.type].get((n, products)),
        note=say,
    )
    return dataclasses.replace(
        row,
        plain_seconds=row.plain_seconds / few,
        fast_seconds=row.fast_seconds / n,
        plain_bytes=peaks[0],
        fast_bytes=None if peaks[1] is None else peaks[1] // n,
    )


def runs_of(args: argparse.Namespace, device: torch.device) -> list[tuple[int, str]]:
    """Requests in a batch and type of products of each row: those asked for, all of `RUNS` where none are."""
    defaults = list(RUNS[device.type])
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
        choices=list(Z_PRODUCTS),
        nargs="+",
        default=None,
        help="types that the fast way multiplies in",
    )
    args = parser.parse_args(argv)
    device = device_of(args)
    model, tokenizer, hparams = benchmark_model(device)
    if args.steps:
        hparams = dataclasses.replace(hparams, v_num_grad_steps=args.steps)
    runs = runs_of(args, device)
    largest = max(n for n, _ in runs)
    rows = [
        measure(model, tokenizer, hparams, n, products, args, counted=n == largest) for n, products in runs
    ]
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
