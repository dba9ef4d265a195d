"""AlphaEdit's solve of one batch of a run, beside P (C + K K^T) + L2 I as a dense matrix and its LU.

    python -m benchmarks.alphaedit_solve
    python -m benchmarks.alphaedit_solve --device cuda     # in = 18944, Qwen2.5-7B's

The plain way in float32, as the published code has it, and in float64, as the fast one is; the difference is that of X
(in x n). Keys are kept for the batches after it in both (C + K K^T; `SequentialSolve.append`). P removes a third of the
directions, about what the second moments of the default model give.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.common import (
    MIB,
    Comparison,
    Measured,
    benchmark_parser,
    compare,
    device_of,
    finish,
    relative,
)
from benchmarks.plain import solves as plain
from sphere.commands.common import positive_int, run_cli
from sphere.methods.null_space import Projector
from sphere.methods.sequential_solve import SequentialSolve

RIDGE = 10.0  # L2
REMOVED = 0.35  # share of the directions that P removes


def random_keys(inp: int, n: int, device: torch.device) -> Tensor:
    """K (in x n): some directions that all keys share, as a model's have, and their own."""
    shared = torch.randn(inp, 64, device=device) @ torch.randn(64, n, device=device) / 8
    return (shared + torch.randn(inp, n, device=device)) / 4


def random_projector(inp: int, device: torch.device) -> Projector:
    """P of random directions; only its shape matters here."""
    removed = int(inp * REMOVED)
    basis = torch.linalg.qr(torch.randn(inp, removed, device=device)).Q
    return Projector(basis.contiguous(), True, inp - removed)


def measure(inp: int, n: int, batch: int, dtype: torch.dtype, turns: int, device: torch.device) -> Comparison:
    """One row: batch number `batch` of a run."""
    torch.manual_seed(0)
    projector = random_projector(inp, device)
    dense = (torch.eye(inp, device=device) - projector.basis @ projector.basis.T).to(dtype)
    solve = SequentialSolve(projector.apply, RIDGE, "the benchmark")
    cache = torch.zeros(inp, inp, dtype=dtype, device=device)
    for _ in range(batch - 1):
        earlier = random_keys(inp, n, device)
        solve.append(earlier)
        solve.compact()
        cache.addmm_(earlier.to(dtype), earlier.to(dtype).T)
    keys = random_keys(inp, n, device)

    now = [solve]

    def before() -> None:
        now[0] = deepcopy(solve)

    def fast() -> Tensor:
        x = now[0].solve(keys)
        now[0].append(keys)
        now[0].compact()
        return x

    def by_plain() -> Tensor:
        x = plain.alphaedit(dense, keys.to(dtype), cache, RIDGE)
        cache + keys.to(dtype) @ keys.to(dtype).T  # C of the next batch
        return x

    def note(_: Measured) -> str:
        held = projector.basis.nbytes / MIB
        return f"P takes {held:.0f} MiB, as a dense float32 matrix {inp * inp * 4 / MIB:.0f} MiB"

    label = str(dtype).removeprefix("torch.")
    return compare(
        f"AlphaEdit's solve, plain {label}",
        f"in {inp}, n {n}, batch {batch}",
        by_plain,
        fast,
        difference=relative,
        device=device,
        turns=turns,
        before=before,
        goal=10 if (inp, batch) == (4096, 10) or device.type == "cuda" else None,
        note=note,
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__, turns=2)
    parser.add_argument("--inp", type=positive_int, default=None, help="in_features of the edited module")
    parser.add_argument("--n", type=positive_int, default=100, help="requests of a batch")
    parser.add_argument("--batch", type=positive_int, default=10, help="which batch of the run is measured")
    args = parser.parse_args(argv)
    device = device_of(args)
    inp = args.inp or (18944 if device.type == "cuda" else 4096)
    rows = [
        measure(inp, args.n, args.batch, dtype, args.turns, device)
        for dtype in (torch.float32, torch.float64)
    ]
    if args.inp is None and device.type != "cuda":  # the default model's width, and more keys than that
        rows += [measure(1536, args.n, batch, torch.float32, args.turns, device) for batch in (1, 10, 40)]
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
