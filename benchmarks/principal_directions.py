"""Principal directions from the weight's smaller side, beside an eigendecomposition of the in x in matrix.

    python -m benchmarks.principal_directions
    python -m benchmarks.principal_directions --device cuda     # 3584 x 18944, Qwen2.5-7B's

Both in float32, as the weights are. The difference is that of a random update's part that the projection takes away,
relative to that part with the directions of float64 arithmetic; a rank that differs is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import Measured, Row, benchmark_parser, compare, device_of, finish, relative
from benchmarks.plain import projection as plain
from sphere.cli import run_cli
from sphere.errors import SphereError
from sphere.projection import principal_directions

BETA_HSE = 0.5


def random_weight(out: int, inp: int, seed: int, device: torch.device) -> Tensor:
    """W (out x in) with a spectrum that falls slowly, as a trained weight's does."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator)
    shared = torch.randn(out, 32, generator=generator) @ torch.randn(32, inp, generator=generator)
    return ((weight + 0.1 * shared) / inp**0.5).to(device)


def measure(weight: Tensor, turns: int, goal: float | None) -> Row:
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


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), default=None)
    args = parser.parse_args(argv)
    device = device_of(args)
    cuda = device.type == "cuda"
    shapes = [tuple(args.shape)] if args.shape else [(3584, 18944)] if cuda else [(576, 1536), (1024, 4096)]
    rows = []
    for out, inp in shapes:
        goal = 20 if (out, inp) == (1024, 4096) or cuda else None
        rows.append(measure(random_weight(out, inp, 0, device), args.turns, goal))
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
