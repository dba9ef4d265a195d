"""The one least-squares solve behind AlphaEdit, MEMIT and their sequential forms.

All of them write a batch's residual R (out x n) onto its keys K (in x n) as Delta = R X^T with

    X = (c S^-1 + C + K K^T)^-1 K,      C = sum of K K^T over the earlier batches,

where S, the preconditioner, says which directions are cheap to change and c how much any change costs:

    AlphaEdit   S = P (null-space projector), c = L2:    X = (P (C + K K^T) + L2 I)^-1 P K
    MEMIT       S = (lambda M)^-1,            c = 1:     X = (lambda M + C + K K^T)^-1 K
    ENCORE      S = (lambda M + mu I)^-1,     c = 1:     X = (lambda M + mu I + C + K K^T)^-1 K
    EMMET       S = (lambda M + mu I)^-1,     c = lambda_e, C = 0:    X = S K (K^T S K + lambda_e I)^-1

An edit makes the directions of its keys more expensive for those after it. With T = (S^-1 + C / c)^-1, by Woodbury's
identity,

    T = S at first,    Y = T K,    F F^T = K^T Y + c I,    B = Y F^-T,    X = B F^-1,    T <- T - B B^T

(recursive least squares: X is the gain, T the covariance, B the factor of its downdate; F is a Cholesky factor). As
long as there are fewer keys than `in`, T is kept as S less B B^T of the batches, with a column (in x N in all) per key.
Then it is made a matrix, T_m, which is the smaller of the two, and kept as T_m less B B^T of the batches since, until
these have in / 8 columns and a new T_m takes them in. So memory, the cost of a batch and what is saved of the earlier
ones (T_m and the keys since) stay the same however many keys follow. In float64; a batch costs O(in (N + rank of S's
factor) n), later O(in^2 n), and never an LU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere.errors import SphereError

RESIDUAL_TOLERANCE = 1e-5
BLOCK = 256  # columns that are worth a matrix of their own
SKETCH = 8  # random directions in which the residual of a solve is estimated
PENDING = 8  # beside the matrix T_m, B has up to in / PENDING columns and those of a batch

Apply = Callable[[Tensor], Tensor]  # K (in x n) -> S K (in x n)


@dataclass(frozen=True)
class Compacted:
    """The state after some batches, in a size that does not depend on how many they were; never changed in place.

    Attributes:
        n_batches: how many.
        t: T_m (in x in) after them, float64.
        c_s_w: C S W (in x SKETCH) of their keys, float64: what the check of a solve knows of C.
    """

    n_batches: int
    t: Tensor
    c_s_w: Tensor


class SequentialSolve:
    """X of the equation above for one batch after the other.

    Args:
        apply_s: K (in x n) -> S K (in x n) in float64, S symmetric positive semi-definite.
        damping: c > 0.
        what: names the layer in errors.

    Attributes:
        compacted: T_m, once there were as many keys as `in`.
        key_blocks: the keys of the batches since, (in x n_i) float32 each, on the CPU. These two are what is saved.
    """

    def __init__(self, apply_s: Apply, damping: float, what: str) -> None:
        if not damping > 0:
            raise SphereError(f"The damping of {what} must be positive, got {damping}: correct L2.")
        self.apply_s, self.damping, self.what = apply_s, damping, what
        self.compacted: Compacted | None = None
        self.key_blocks: list[Tensor] = []
        self._downdates: list[Tensor] = []  # their B (in x N) in blocks of columns: T = (T_m or S) - B B^T
        # Random directions W (in x SKETCH), S W and C S W.
        self._sketch: tuple[Tensor, Tensor, Tensor] | None = None
        # Of the last solve: K and B.
        self._solved: tuple[Tensor, Tensor] | None = None

    @property
    def n_batches(self) -> int:
        """Number of earlier batches."""
        return self._n_compacted + len(self.key_blocks)

    @property
    def nbytes(self) -> int:
        """What is kept of earlier batches where the solve is done: B, and T_m."""
        matrix = 0 if self.compacted is None else self.compacted.t.nbytes
        return matrix + sum(block.nbytes for block in self._downdates)

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
        if self._downdates and self._downdates[-1].shape[1] < BLOCK:
            self._downdates[-1] = torch.cat([self._downdates[-1], b], dim=1)
        else:
            self._downdates.append(b.contiguous())

    def compact(self) -> None:
        """Between two batches: T_m <- T, where B has become wide enough; the batches so far are never forgotten."""
        columns = sum(block.shape[1] for block in self._downdates)
        if not columns:
            return
        size = len(self._downdates[0])
        if columns <= (size if self.compacted is None else size // PENDING):
            return
        # A new matrix: whoever holds the old one as a saved state keeps it as it is.
        t = self._dense_s(self._downdates[0]) if self.compacted is None else self.compacted.t.clone()
        for block in self._downdates:
            t.addmm_(block, block.T, alpha=-1)
        self.compacted = Compacted(self.n_batches, t, self._read_sketch(t)[2])
        self.key_blocks, self._downdates, self._solved = [], [], None

    def truncate(self, n_batches: int) -> None:
        """Forget all but the first `n_batches` batches: exactly the state of then.

        Raises:
            SphereError: T_m has taken in more of them.
        """
        self._solved = None
        left = n_batches - self._n_compacted
        if left >= len(self.key_blocks):
            return
        if left < 0:
            raise SphereError(
                f"{self.what} cannot go back to {n_batches} batches: {self._n_compacted} are one matrix; call "
                "`compact`, or a method's `state`, between batches only."
            )
        device, self._sketch = self._downdates[0].device, None
        self.key_blocks = self.key_blocks[:left]
        for block in self.key_blocks:
            self._update_sketch(block.to(device).double())
        blocks, self._downdates = self._downdates, []
        columns = sum(block.shape[1] for block in self.key_blocks)
        for block in blocks:  # earlier columns are untouched by later ones
            if columns > 0:
                self._downdates.append(block[:, :columns].contiguous())
            columns -= block.shape[1]

    def load(self, compacted: Compacted | None, blocks: Sequence[Tensor], device: torch.device) -> None:
        """Take up a saved state: the keys since T_m by the very operations that built it, on the keys' device.

        Keys of all batches, without T_m, are compacted on the way as they would have been.
        """
        self.compacted, self.key_blocks, self._downdates = None, [], []
        self._sketch = self._solved = None
        if compacted is not None:  # copied: products of a mapped file's tensor may differ in their last bits
            t, c_s_w = (part.to(device, copy=True) for part in (compacted.t, compacted.c_s_w))
            self.compacted = Compacted(compacted.n_batches, t, c_s_w)
        for block in blocks:
            self.append(block.to(device))
            self.compact()

    @property
    def _n_compacted(self) -> int:
        return 0 if self.compacted is None else self.compacted.n_batches

    def _downdate(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """B = T K F^-T (in x n), and F (n x n), the lower Cholesky factor of K^T T K + c I."""
        if not torch.isfinite(keys).all():
            raise SphereError(f"The keys of {self.what} are not finite: the weights below it may be broken.")
        y = self.apply_s(keys) if self.compacted is None else self.compacted.t @ keys
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

    def _dense_s(self, like: Tensor) -> Tensor:
        """S (in x in)."""
        size = len(like)
        t = torch.empty(size, size, dtype=like.dtype, device=like.device)
        for start in range(0, size, BLOCK):
            unit = torch.zeros(size, min(BLOCK, size - start), dtype=like.dtype, device=like.device)
            unit[start : start + BLOCK] = torch.eye(unit.shape[1], dtype=like.dtype, device=like.device)
            t[:, start : start + BLOCK] = self.apply_s(unit)
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
            c_s_w = torch.zeros_like(w) if self.compacted is None else self.compacted.c_s_w
            self._sketch = w, self.apply_s(w), c_s_w
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


def inverse_moment(second_moment: Tensor, weight: float, what: str, ridge: float = 0.0) -> Apply:
    """K -> (lambda M + mu I)^-1 K in float64, with the matrix factorised once.

    The factor is kept, and the systems are solved, where the second moment is: K may be on another device.

    Args:
        second_moment: M (in x in).
        weight: lambda, `mom2_update_weight`.
        ridge: mu.

    Raises:
        SphereError: a second moment that is singular beyond rounding.
    """
    shift = ridge / weight if ridge else 0.0  # M + mu / lambda I is factorised
    factor = second_moment.to(torch.float64, copy=True).T  # symmetric, and as LAPACK wants it
    if shift:
        factor.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))  # in place: no second matrix of this size
    if int(info):  # rounding of a float32 second moment can push its smallest eigenvalues below zero
        factor.copy_(second_moment)
        factor.diagonal().add_(torch.finfo(torch.float32).eps * factor.diagonal().max() + shift)
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


def save_solves(solves: Mapping[int, SequentialSolve]) -> dict[str, Tensor]:
    """The state of every layer for a resume point, compacted where that is due.

    "t.<layer>.<batches>" (in x in) and "c_s_w.<layer>.<batches>" (in x SKETCH) where there is a matrix;
    "keys.<layer>.<batch>" (in x n) of each batch since, counted from 0.
    """
    saved: dict[str, Tensor] = {}
    for layer, solve in solves.items():
        solve.compact()
        done = solve.n_batches - len(solve.key_blocks)
        if solve.compacted is not None:
            saved |= {f"t.{layer}.{done}": solve.compacted.t, f"c_s_w.{layer}.{done}": solve.compacted.c_s_w}
        saved |= {f"keys.{layer}.{i}": block for i, block in enumerate(solve.key_blocks, done)}
    return saved


def keep_solves(solves: Mapping[int, SequentialSolve], names: Collection[str]) -> None:
    """Forget the batches since `save_solves` returned these names."""
    for layer, solve in solves.items():
        solve.truncate(_compacted_batches(layer, names) + _n_key_blocks(layer, names))


def load_solves(
    solves: Mapping[int, SequentialSolve], state: Mapping[str, Tensor], devices: Mapping[int, torch.device]
) -> None:
    """Take up what `save_solves` saved; `devices` says where each layer's keys are made."""
    for layer, solve in solves.items():
        done, count = _compacted_batches(layer, state), _n_key_blocks(layer, state)
        compacted = (
            Compacted(done, state[f"t.{layer}.{done}"], state[f"c_s_w.{layer}.{done}"]) if done else None
        )
        solve.load(compacted, [state[f"keys.{layer}.{i}"] for i in range(done, done + count)], devices[layer])


def _compacted_batches(layer: int, names: Collection[str]) -> int:
    prefix = f"t.{layer}."
    return next((int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)), 0)


def _n_key_blocks(layer: int, names: Collection[str]) -> int:
    return sum(name.startswith(f"keys.{layer}.") for name in names)
