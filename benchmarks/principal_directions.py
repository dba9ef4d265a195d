"""Principal directions from the weight's smaller side, beside an eigendecomposition of the in x in matrix.

    python -m benchmarks.principal_directions
    python -m benchmarks.principal_directions --device cuda     # 3584 x 18944, Qwen2.5-7B's
    python -m benchmarks.principal_directions --warm_start      # why no batch starts from the one before

Both in float32, as the weights are. The difference is that of a random update's part that the projection takes away,
relative to that part with the directions of float64 arithmetic; a rank that differs is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import (
    Comparison,
    Measured,
    benchmark_parser,
    compare,
    device_of,
    finish,
    relative,
    time_of,
)
from benchmarks.plain import projection as plain
from sphere.commands.common import run_cli
from sphere.errors import SphereError
from sphere.projection import principal_directions

BETA_HSE = 0.5


def random_weight(out: int, inp: int, seed: int, device: torch.device) -> Tensor:
    """W (out x in) with a spectrum that falls slowly, as a trained weight's does."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator)
    shared = torch.randn(out, 32, generator=generator) @ torch.randn(32, inp, generator=generator)
    return ((weight + 0.1 * shared) / inp**0.5).to(device)


def measure(weight: Tensor, turns: int, goal: float | None) -> Comparison:
    """One row: U of one weight."""
    out, inp = weight.shape
    update = torch.randn(64, inp, generator=torch.Generator().manual_seed(1)).double().to(weight.device)

    def difference(fast: Tensor, by_plain: Tensor) -> float:
        exact = exact_directions(weight)
        if not fast.shape[1] == by_plain.shape[1] == exact.shape[1]:
            raise SphereError(f"Ranks: {fast.shape[1]}, plain {by_plain.shape[1]}, exact {exact.shape[1]}.")
        taken, wanted = ((update @ u.double()) @ u.double().T for u in (fast, exact))
        return relative(taken, wanted)

    def note(fast: Measured) -> str:
        return f"r = {fast.result.shape[1]}"

    return compare(
        "principal directions",
        f"{out} x {inp}, {str(weight.dtype).removeprefix('torch.')}",
        lambda: plain.principal_directions(weight, BETA_HSE),
        lambda: principal_directions(weight, BETA_HSE).basis,
        difference=difference,
        device=weight.device,
        turns=turns,
        goal=goal,
        note=note,
    )


def exact_directions(weight: Tensor) -> Tensor:
    """U (in x r) in float64, by a singular value decomposition's way: at these sizes the plain one takes too long."""
    normed = weight.double() / (weight.double().norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(normed @ normed.T)
    rank = int((values.flip(0).cumsum(0) / values.sum() <= BETA_HSE).sum()) + 1
    return torch.linalg.qr(normed.T @ vectors[:, -rank:]).Q


def warm_start(weight: Tensor, change: float = 0.01, steps: int = 8) -> str:
    """How far subspace iteration gets from the directions of before an update of `change` times the weight's norm.

    The spectrum falls slowly where it is cut, so directions near the cut turn into each other by the ratio of
    neighboring eigenvalues per step, which is nearly 1, and r is no small part of the side: neither a warm start nor a
    method for a few leading eigenpairs reaches the exact answer in the time of the whole decomposition.
    """
    generator = torch.Generator().manual_seed(2)
    update = torch.randn(len(weight), 100, generator=generator) @ torch.randn(
        100, weight.shape[1], generator=generator
    )
    update = update.to(weight)
    changed = weight + update * (change * weight.norm() / update.norm())
    basis = principal_directions(weight, BETA_HSE).basis
    exact_seconds, exact = time_of(lambda: principal_directions(changed, BETA_HSE).basis, weight.device)
    normed = changed / (changed.norm(dim=1, keepdim=True) + 1e-8)
    lines = [f"{tuple(weight.shape)}: exact, {exact.shape[1]} directions, {exact_seconds * 1e3:.0f} ms"]
    total = 0.0
    for step in range(steps + 1):
        if step:
            start = basis
            seconds, basis = time_of(
                lambda start=start: torch.linalg.qr(normed.T @ (normed @ start)).Q, weight.device
            )
            total += seconds
        off = exact - basis @ (basis.T @ exact)
        lines.append(
            f"  {step} steps from the earlier ones, {total * 1e3:.0f} ms: the largest angle has sine "
            f"{float(torch.linalg.matrix_norm(off, 2)):.1e}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), default=None)
    parser.add_argument(
        "--warm_start", action="store_true", help="study starts from earlier directions instead"
    )
    args = parser.parse_args(argv)
    device = device_of(args)
    cuda = device.type == "cuda"
    shapes = [tuple(args.shape)] if args.shape else [(3584, 18944)] if cuda else [(576, 1536), (1024, 4096)]
    if args.warm_start:
        print("\n".join(warm_start(random_weight(out, inp, 0, device)) for out, inp in shapes))
        return 0
    rows = []
    for out, inp in shapes:
        goal = 20 if (out, inp) == (1024, 4096) or cuda else None
        rows.append(measure(random_weight(out, inp, 0, device), args.turns, goal))
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
