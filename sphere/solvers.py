"""The one least-squares solve behind AlphaEdit, MEMIT and their sequential forms.

All of them write a batch's residual R (out x n) onto its keys K (in x n) as Delta = R X^T with

    X = S A (A^T S A + c I)^-1 E,      A = [K_earlier, K],  E = the last n columns of the identity,

which is (S^-1 c + A A^T)^-1 K by the push-through identity. S says which directions are cheap to change and c how much
any change costs:

    AlphaEdit   S = P (null-space projector), c = L2
    MEMIT       S = (lambda M)^-1,            c = 1

So the only matrices formed are (in x N) and (N x N), N the number of keys so far, in float64. The Cholesky factor of
A^T S A + c I grows by a block per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from sphere.errors import SphereError

RESIDUAL_TOLERANCE = 1e-6


class SequentialSolve:
    """X of the equation above for one batch after the other.

    Args:
        spread: K (in x n) -> S K (in x n), S symmetric positive semi-definite.
        damping: c > 0.
        what: names the layer in errors.
    """

    def __init__(self, spread: Callable[[Tensor], Tensor], damping: float, what: str) -> None:
        if not damping > 0:
            raise SphereError(f"The damping of {what} must be positive, got {damping}: correct L2.")
        self.spread, self.damping, self.what = spread, damping, what
        # Earlier keys, (in x n_i) float32 each, on the CPU: all of the state that is saved.
        self.blocks: list[Tensor] = []
        self._keys: Tensor | None = None  # A (in x N) float64
        self._spread_keys: Tensor | None = None  # S A (in x N)
        self._factor: Tensor | None = None  # lower Cholesky factor of A^T S A + c I (N x N)
        # What the last solve extended to.
        self._pending: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def n_keys(self) -> int:
        """Number of earlier keys."""
        return 0 if self._keys is None else self._keys.shape[1]

    def solve(self, keys: Tensor) -> Tensor:
        """X (in x n) for a batch's keys K (in x n), given the earlier ones; float64.

        Raises:
            SphereError: keys that are not finite, or a system that is not positive definite.
        """
        keys = keys.double().contiguous()  # one layout, before and after a resume: the same bits
        a, sa, factor = extended = self._extended(keys)
        self._pending = (keys, extended)
        n = keys.shape[1]
        unit = torch.zeros(a.shape[1], n, dtype=torch.float64, device=keys.device)
        unit[-n:] = torch.eye(n, dtype=torch.float64, device=keys.device)
        coefficients = torch.cholesky_solve(unit, factor)  # N x n
        x = sa @ coefficients
        residual = a.T @ x + self.damping * coefficients - unit  # the guard on accumulated rounding
        if residual.norm() > RESIDUAL_TOLERANCE * unit.norm():
            raise SphereError(
                f"The solve of {self.what} is off by {residual.norm().item():.1e}: its keys are badly scaled; raise L2 "
                "or mom2_update_weight."
            )
        return x

    def append(self, keys: Tensor) -> None:
        """Keep a batch's keys K (in x n) as earlier ones."""
        kept = keys.float().contiguous()
        solved = self._pending is not None and torch.equal(self._pending[0], kept.double())
        extended = self._pending[1] if solved and self._pending else self._extended(kept.double())
        self._keys, self._spread_keys, self._factor = extended
        self._pending = None
        self.blocks.append(kept.cpu())

    def truncate(self, n_blocks: int) -> None:
        """Forget all but the first `n_blocks` batches: exactly the state of then."""
        self.blocks = self.blocks[:n_blocks]
        self._pending = None
        n = sum(block.shape[1] for block in self.blocks)
        if not n or self._keys is None or self._spread_keys is None or self._factor is None:
            self._keys = self._spread_keys = self._factor = None
        elif n < self._keys.shape[1]:  # earlier columns and rows are untouched by later ones
            self._keys = self._keys[:, :n].contiguous()
            self._spread_keys = self._spread_keys[:, :n].contiguous()
            self._factor = self._factor[:n, :n].contiguous()

    def load(self, blocks: list[Tensor], device: torch.device) -> None:
        """Rebuild the state from saved blocks, by the very operations that built it, on the keys' device."""
        for block in blocks:
            self.append(block.to(device))

    def _extended(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, S A and the Cholesky factor with these keys (in x n, float64) added."""
        if not torch.isfinite(keys).all():
            raise SphereError(f"The keys of {self.what} are not finite: the weights below it may be broken.")
        spread = self.spread(keys)
        corner = keys.T @ spread
        corner = (corner + corner.T) / 2 + self.damping * torch.eye(
            keys.shape[1], dtype=keys.dtype, device=keys.device
        )
        if self._keys is None or self._spread_keys is None or self._factor is None:
            return keys, spread, self._cholesky(corner)
        side = self._keys.T @ spread  # N x n
        below = torch.linalg.solve_triangular(self._factor, side, upper=False).T  # n x N
        last = self._cholesky(corner - below @ below.T)
        top = torch.cat([self._factor, torch.zeros_like(side)], dim=1)
        factor = torch.cat([top, torch.cat([below, last], dim=1)])
        return torch.cat([self._keys, keys], dim=1), torch.cat([self._spread_keys, spread], dim=1), factor

    def _cholesky(self, matrix: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise SphereError(
                f"The system of {self.what} is not positive definite: raise L2 or mom2_update_weight."
            )
        return factor


def inverse_moment(second_moment: Tensor, weight: float, what: str) -> Callable[[Tensor], Tensor]:
    """K -> (lambda M)^-1 K in float64, with lambda M factorised once.

    The factor is kept, and the systems are solved, where the second moment is: K may be on another device.

    Args:
        second_moment: M (in x in).
        weight: lambda, `mom2_update_weight`.

    Raises:
        SphereError: a second moment that is singular beyond rounding.
    """
    moment = second_moment.double()
    moment = weight * (moment + moment.T) / 2
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info):  # rounding of a float32 second moment can push its smallest eigenvalues below zero
        jitter = torch.finfo(torch.float32).eps * moment.diagonal().max()
        factor, info = torch.linalg.cholesky_ex(moment + jitter * torch.eye(len(moment)).to(moment))
    if int(info) or not weight > 0:
        raise SphereError(
            f"The second moment of {what}, times mom2_update_weight {weight:g}, is not positive definite: use a larger "
            "mom2_n_samples (more tokens than in_features) and a positive mom2_update_weight."
        )
    return lambda keys: torch.cholesky_solve(keys.to(factor.device), factor).to(keys.device)


def save_keys(solves: Mapping[int, SequentialSolve]) -> dict[str, Tensor]:
    """The earlier keys of every layer, for a resume point: "keys.<layer>.<batch>" -> (in x n)."""
    return {f"keys.{layer}.{i}": block for layer, s in solves.items() for i, block in enumerate(s.blocks)}


def keep_keys(solves: Mapping[int, SequentialSolve], names: Collection[str]) -> None:
    """Forget what `save_keys` would save under other names than these."""
    for layer, solve in solves.items():
        solve.truncate(sum(name.startswith(f"keys.{layer}.") for name in names))


def load_keys(
    solves: Mapping[int, SequentialSolve], state: Mapping[str, Tensor], devices: Mapping[int, torch.device]
) -> None:
    """Take up what `save_keys` saved; `devices` says where each layer's keys are made."""
    for layer, solve in solves.items():
        count = sum(name.startswith(f"keys.{layer}.") for name in state)
        solve.load([state[f"keys.{layer}.{i}"] for i in range(count)], devices[layer])
