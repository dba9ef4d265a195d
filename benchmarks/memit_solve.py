"""The solves of ten MEMIT batches with lambda M factorised once, beside an LU of an in x in matrix for each.

    python -m benchmarks.memit_solve
    python -m benchmarks.memit_solve --device cuda     # in = 18944, Qwen2.5-7B's

Both in float64. The fast way's time holds its factorisation; the difference is the largest of the batches' X (in x n).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.alphaedit_solve import random_keys
from benchmarks.common import Comparison, benchmark_parser, compare, device_of, finish, peak_of, relative
from benchmarks.plain import solves as plain
from sphere.commands.common import positive_int, run_cli
from sphere.methods.sequential_solve import SequentialSolve, inverse_moment

WEIGHT = 50.0  # mom2_update_weight


def random_moment(inp: int, device: torch.device) -> Tensor:
    """E[k k^T] (in x in) in float32 with eigenvalues over four orders of magnitude."""
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.randn(inp, 2 * inp, generator=generator, device=device)
    keys *= torch.logspace(0, -2, inp, device=device)[:, None]
    return keys @ keys.T / (2 * inp)


def measure(inp: int, n: int, batches: int, sequential: bool, turns: int, device: torch.device) -> Comparison:
    """One row: all batches of a run, of MEMIT or (`sequential`) of MEMIT_seq."""
    torch.manual_seed(0)
    moment = random_moment(inp, device)
    keys = [random_keys(inp, n, device) for _ in range(batches)]

    def by_plain(count: int = batches) -> list[Tensor]:
        second, found = moment.double(), []
        cache = torch.zeros_like(second) if sequential else None
        for k in keys[:count]:
            found.append(plain.memit(second, k.double(), cache, WEIGHT))
            if cache is not None:
                cache = cache + k.double() @ k.double().T
        return found

    def fast() -> list[Tensor]:
        solve, found = SequentialSolve(inverse_moment(moment, WEIGHT, "layer"), 1.0, "layer"), []
        for k in keys:
            found.append(solve.solve(k))
            if sequential:
                solve.append(k)
                solve.compact()
        return found

    row = compare(
        "MEMIT_seq's solves" if sequential else "MEMIT's solves",
        f"in {inp}, n {n}, {batches} batches",
        by_plain,
        fast,
        difference=lambda a, b: max(relative(x, y) for x, y in zip(a, b, strict=True)),
        device=device,
        turns=turns,
        warm_plain=False,
        goal=8 if inp >= 4096 and batches >= 10 else None,
    )
    return replace(row, plain_bytes=peak_of(lambda: by_plain(1), device))


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__, turns=1)
    parser.add_argument("--inp", type=positive_int, default=None, help="in_features of the edited module")
    parser.add_argument("--n", type=positive_int, default=100, help="requests of a batch")
    parser.add_argument("--batches", type=positive_int, default=10)
    args = parser.parse_args(argv)
    device = device_of(args)
    inp = args.inp or (18944 if device.type == "cuda" else 4096)
    rows = [
        measure(inp, args.n, args.batches, sequential, args.turns, device) for sequential in (False, True)
    ]
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
