"""The one least-squares solve behind AlphaEdit, MEMIT and their sequential forms.

All of them write a batch's residual R (out x n) onto its keys K (in x n) as Delta = R X^T with

    X = (c S^-1 + C + K K^T)^-1 K,      C = sum of K K^T over the earlier batches,

where S, the preconditioner, says which directions are cheap to change and c how much any change costs:

    AlphaEdit   S = P (null-space projector), c = L2:    X = (P (C + K K^T) + L2 I)^-1 P K
    MEMIT       S = (lambda M)^-1,            c = 1:     X = (lambda M + C + K K^T)^-1 K

An edit makes the directions of its keys more expensive for those after it. With T = (S^-1 + C / c)^-1, by Woodbury's
identity,

    T = S at first,    Y = T K,    F F^T = K^T Y + c I,    B = Y F^-T,    X = B F^-1,    T <- T - B B^T

(recursive least squares: X is the gain, T the covariance, B the factor of its downdate; F is a Cholesky factor). As
long as there are fewer keys than `in`, T is kept as S less B B^T of the batches, with a column (in x N in all) per key;
beyond that as a matrix, which is then the smaller of the two and costs the same however many keys follow. In float64; a
batch costs O(in (N + rank of S's factor) n), and never an LU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from sphere.errors import SphereError

RESIDUAL_TOLERANCE = 1e-5
BLOCK = 256  # columns that are worth a matrix of their own
SKETCH = 8  # random directions in which the residual of a solve is estimated

Apply = Callable[[Tensor], Tensor]  # K (in x n) -> S K (in x n)


class SequentialSolve:
    """X of the equation above for one batch after the other.

    Args:
        apply_s: K (in x n) -> S K (in x n) in float64, S symmetric positive semi-definite.
        damping: c > 0.
        what: names the layer in errors.
    """

    def __init__(self, apply_s: Apply, damping: float, what: str) -> None:
        if not damping > 0:
            raise SphereError(f"The damping of {what} must be positive, got {damping}: correct L2.")
        self.apply_s, self.damping, self.what = apply_s, damping, what
        # Earlier keys, (in x n_i) float32 each, on the CPU: all of the state that is saved.
        self.key_blocks: list[Tensor] = []
        self._downdates: list[Tensor] = []  # B (in x N) in blocks of columns, as long as T = S - B B^T
        self._t: Tensor | None = None  # T (in x in) after that
        # Random directions W (in x SKETCH), S W and C S W: what the check of a solve knows of C.
        self._sketch: tuple[Tensor, Tensor, Tensor] | None = None
        # Of the last solve: K and B.
        self._solved: tuple[Tensor, Tensor] | None = None

    @property
    def n_keys(self) -> int:
        """Number of earlier keys."""
        return sum(block.shape[1] for block in self.key_blocks)

    @property
    def nbytes(self) -> int:
        """What is kept of earlier batches where the solve is done: B, or T."""
        return sum(part.nbytes for part in [*self._downdates, *([] if self._t is None else [self._t])])

    def solve(self, keys: Tensor) -> Tensor:
        """X (in x n) for a batch's keys K (in x n), given the earlier ones; float64.

        Raises:
            SphereError: keys that are not finite, or a system that is not positive definite.
        """
        keys = keys.double().contiguous()
        b, factor = self._downdate(keys)
        self._solved = keys, b
        x = torch.linalg.solve_triangular(factor, b, upper=False, left=False)
        if (error := self._error(keys, x)) > RESIDUAL_TOLERANCE:
            raise SphereError(
                f"The solve of {self.what} is off by {error:.1e}: its keys are badly scaled; raise L2 or "
                "mom2_update_weight."
            )
        return x

    def append(self, keys: Tensor) -> None:
        """Keep a batch's keys K (in x n) as earlier ones."""
        kept = keys.float().contiguous()
        solved, self._solved = self._solved, None
        if solved is not None and torch.equal(solved[0], kept.double()):
            b = solved[1]
        else:
            b, _ = self._downdate(kept.double())
        self.key_blocks.append(kept.cpu())
        self._update_sketch(kept.double())
        if self._t is not None:
            self._t.addmm_(b, b.T, alpha=-1)
            return
        if self._downdates and self._downdates[-1].shape[1] < BLOCK:
            self._downdates[-1] = torch.cat([self._downdates[-1], b], dim=1)
        else:
            self._downdates.append(b.contiguous())
        if self.n_keys > len(b):
            self._t = self._as_matrix(b)
            self._downdates = []

    def truncate(self, n_blocks: int) -> None:
        """Forget all but the first `n_blocks` batches: exactly the state of then."""
        self._solved = None
        if n_blocks >= len(self.key_blocks):
            return
        kept, self.key_blocks = self.key_blocks[:n_blocks], self.key_blocks[:n_blocks]
        device = (self._downdates[0] if self._t is None else self._t).device
        self._sketch = None
        if self._t is not None:
            self._t, self.key_blocks = None, []
            self.load(kept, device)
            return
        for block in kept:
            self._update_sketch(block.to(device).double())
        blocks, self._downdates = self._downdates, []
        left = self.n_keys
        for block in blocks:  # earlier columns are untouched by later ones
            if left > 0:
                self._downdates.append(block[:, :left].contiguous())
            left -= block.shape[1]

    def load(self, blocks: list[Tensor], device: torch.device) -> None:
        """Rebuild the state from saved blocks, by the very operations that built it, on the keys' device."""
        for block in blocks:
            self.append(block.to(device))

    def _downdate(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """B = T K F^-T (in x n), and F (n x n), the lower Cholesky factor of K^T T K + c I."""
        if not torch.isfinite(keys).all():
            raise SphereError(f"The keys of {self.what} are not finite: the weights below it may be broken.")
        if self._t is not None:
            y = self._t @ keys
        else:
            y = self.apply_s(keys)
            for block in self._downdates:
                y = y.addmm(block, block.T @ keys, alpha=-1)
        g = keys.T @ y
        g = (g + g.T) / 2
        g.diagonal().add_(self.damping)
        factor, info = torch.linalg.cholesky_ex(g)
        if int(info):
            raise SphereError(
                f"The system of {self.what} is not positive definite: raise L2 or mom2_update_weight."
            )
        return torch.linalg.solve_triangular(factor.T, y, upper=True, left=False), factor

    def _as_matrix(self, like: Tensor) -> Tensor:
        """T = S - B B^T (in x in)."""
        size = len(like)
        t = torch.empty(size, size, dtype=like.dtype, device=like.device)
        for start in range(0, size, BLOCK):
            unit = torch.zeros(size, min(BLOCK, size - start), dtype=like.dtype, device=like.device)
            unit[start : start + BLOCK] = torch.eye(unit.shape[1], dtype=like.dtype, device=like.device)
            t[:, start : start + BLOCK] = self.apply_s(unit)
        for block in self._downdates:
            t.addmm_(block, block.T, alpha=-1)
        return t

    def _update_sketch(self, keys: Tensor) -> None:
        """Add a batch's keys (in x n, float64) to the sketch of C."""
        w, s_w, c_s_w = self._read_sketch(keys)
        self._sketch = w, s_w, c_s_w + keys @ (keys.T @ s_w)

    def _read_sketch(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W, S W and C S W (in x SKETCH each)."""
        if self._sketch is None:
            generator = torch.Generator().manual_seed(0)
            w = torch.randn(len(like), SKETCH, generator=generator, dtype=torch.float64).to(like.device)
            self._sketch = w, self.apply_s(w), torch.zeros_like(w)
        return self._sketch

    def _error(self, keys: Tensor, x: Tensor) -> float:
        """Relative residual of X in its equation, estimated without T: it finds rounding that has accumulated there.

        The equation is S K = S (C + K K^T) X + c X. Both sides, times (1, ..., 1), are projected on the directions W,
        which estimates the norm of their difference, relative to the left side's, in O(in n).
        """
        w, s_w, c_s_w = self._read_sketch(keys)
        xv = x.sum(dim=1)  # in
        left = s_w.T @ keys.sum(dim=1)  # SKETCH
        right = c_s_w.T @ xv + (s_w.T @ keys) @ (keys.T @ xv) + self.damping * (w.T @ xv)
        norm = float(left.norm())
        return float((left - right).norm()) / norm if norm else 0.0


def inverse_moment(second_moment: Tensor, weight: float, what: str) -> Apply:
    """K -> (lambda M)^-1 K in float64, with lambda M factorised once.

    The factor is kept, and the systems are solved, where the second moment is: K may be on another device.

    Args:
        second_moment: M (in x in).
        weight: lambda, `mom2_update_weight`.

    Raises:
        SphereError: a second moment that is singular beyond rounding.
    """
    factor = second_moment.to(torch.float64, copy=True).T  # symmetric, and as LAPACK wants it
    info = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))  # in place: no second matrix of this size
    if int(info):  # rounding of a float32 second moment can push its smallest eigenvalues below zero
        factor.copy_(second_moment)
        factor.diagonal().add_(torch.finfo(torch.float32).eps * factor.diagonal().max())
        torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) or not weight > 0:
        raise SphereError(
            f"The second moment of {what}, times mom2_update_weight {weight:g}, is not positive definite: use a larger "
            "mom2_n_samples (more tokens than in_features) and a positive mom2_update_weight."
        )

    def inverse(keys: Tensor) -> Tensor:  # not cholesky_solve: it copies the factor
        half = torch.linalg.solve_triangular(factor, keys.to(factor.device), upper=False)
        return (torch.linalg.solve_triangular(factor.T, half, upper=True) / weight).to(keys.device)

    return inverse


def save_keys(solves: Mapping[int, SequentialSolve]) -> dict[str, Tensor]:
    """The earlier keys of every layer, for a resume point: "keys.<layer>.<batch>" -> (in x n)."""
    return {f"keys.{layer}.{i}": block for layer, s in solves.items() for i, block in enumerate(s.key_blocks)}


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
