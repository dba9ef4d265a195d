"""What each method keeps in memory beside what every run does, and what its solves cost: for the plan of a run.

Keyed by the method's name; a method of another package that derives from one of these is planned like that one, any
other as one whose updates of all layers are held at once. Knows equations' sizes only; methods know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sphere.hparams import HParams
from sphere.methods import Method
from sphere.methods.null_space import DECOMPOSITION, decomposition_bytes
from sphere.methods.sequential_solve import PENDING
from sphere.runs.memory import (
    DEVICE,
    FLOAT32,
    FLOAT64,
    HOST,
    Item,
    Sizes,
    earlier_keys,
    moment_factors,
    second_moments,
)


@dataclass(frozen=True)
class MethodMemory:
    """What the plan counts of a method.

    Attributes:
        items: (hyperparameters, sizes) -> what it keeps in memory beside what every run does.
        solve_operations: (hyperparameters, sizes) -> floating-point operations of one batch's solves, with the mean
            number of earlier keys of the run.
    """

    items: Callable[[Any, Sizes], list[Item]]
    solve_operations: Callable[[Any, Sizes], float] = lambda _hparams, _sizes: 0.0


def memory_of(method: type[Method]) -> MethodMemory:
    """A method's entry, or the one of the nearest method that it derives from."""
    names = (vars(kind).get("name") for kind in method.__mro__)
    return next((METHODS[name] for name in names if name in METHODS), DEFAULT)


# ---- AlphaEdit ----


def _alphaedit(hparams: Any, sizes: Sizes) -> list[Item]:
    basis = Item(
        "null-space projectors' thinner factors",
        "sum of 4 in^2 / 2 at most",
        FLOAT32 * sizes.sum_squared_in // 2,
        sizes.offload_device,
        since="preparation",
        until="writing",
    )
    decomposition = Item(
        "one of them in the making",
        f"{DECOMPOSITION} x 4 in^2 at most",
        decomposition_bytes(sizes.largest_in),
        sizes.offload_device,
        since="preparation",
        until="preparation",
    )
    return [*second_moments(sizes), basis, decomposition, *earlier_keys(sizes)]


def _betaedit(hparams: Any, sizes: Sizes) -> list[Item]:
    size = 2 * FLOAT64 * sizes.sum_squared_in
    matrices = Item("sums of earlier keys, and factors", "sum of 16 in^2", size, sizes.offload_device)
    return [*_alphaedit(hparams, sizes), matrices]


def _sequential_solve(hparams: Any, sizes: Sizes) -> float:
    return _solves(sizes, sizes.n_edits / 2)


def _solves(sizes: Sizes, earlier: float) -> float:
    """Operations of one batch's solves and updates, after so many earlier keys."""
    n = sizes.num_edits
    return sum(
        in_features * n * (_product_with_t(in_features, earlier) + 4 * n + 2 * out)
        for out, in_features in sizes.edited
    )


def _product_with_t(in_features: int, earlier: float) -> float:
    """Operations of T K per entry of K: S K and B B^T K; or T_m K, B B^T K, and T_m's taking in B, shared out."""
    if earlier <= in_features:
        return 2 * in_features + 4 * earlier
    return 2 * in_features + 4 * in_features / PENDING / 2 + 2 * in_features


# ---- MEMIT and its kin ----


def _memit(hparams: Any, sizes: Sizes) -> list[Item]:
    updates = Item(
        "all layers' updates, and the weights before",
        "(8 + 4) E",
        (FLOAT64 + sizes.exact_bytes) * sizes.entries,
        sizes.offload_device,
        since="solve",
        until="writing",
    )
    return [*second_moments(sizes), *moment_factors(sizes), updates]


def _memit_solve(hparams: Any, sizes: Sizes) -> float:
    return _solves(sizes, 0)


def _memit_seq(hparams: Any, sizes: Sizes) -> list[Item]:
    return [*_memit(hparams, sizes), *earlier_keys(sizes)]


def _rect(hparams: Any, sizes: Sizes) -> list[Item]:
    size = int((4 + 12 * hparams.rect_share + 1) * sizes.largest)  # ratios, chosen values and places, mask
    choosing = Item("relative changes, and which are kept", "10 out in", size, DEVICE, "writing", "writing")
    return [*_memit(hparams, sizes), choosing]


def _prune(hparams: Any, sizes: Sizes) -> list[Item]:
    size = 3 * FLOAT32 * sizes.largest
    condensing = Item("the total change and its SVD", "3 x 4 out in", size, DEVICE, "writing", "writing")
    return [*_memit(hparams, sizes), condensing]


def _lyaplock(hparams: Any, sizes: Sizes) -> list[Item]:
    sums = FLOAT64 * (sizes.sum_squared_in + sizes.entries)
    kept = FLOAT32 * sum(
        (out + in_features) * min(sizes.n_edits, in_features) for out, in_features in sizes.edited
    )
    return [
        *second_moments(sizes),
        Item("sums of earlier keys and values", "8 (in^2 + out in)", sums, sizes.offload_device),
        Item("earlier keys and values", "4 (in + out) N, N at most in", kept, HOST),
        Item(
            "a layer's system",
            "3 x 8 in^2 + 5 x 8 out in",
            FLOAT64 * (3 * sizes.largest_in**2 + 5 * sizes.largest),
            sizes.offload_device,
            "solve",
            "writing",
        ),
    ]


def _lyaplock_solve(hparams: Any, sizes: Sizes) -> float:
    """A factorisation, and four products of the weight with an in x in matrix."""
    return sum(i**3 / 3 + 4 * 2 * out * i**2 + 2 * i * (i + out) * sizes.num_edits for out, i in sizes.edited)


# ---- other families ----


def _rome(hparams: Any, sizes: Sizes) -> list[Item]:
    return [*second_moments(sizes), *moment_factors(sizes)] if hparams.mom2_adjustment else []


def _ft(hparams: Any, sizes: Sizes) -> list[Item]:
    size = 5 * sizes.exact_bytes * sizes.entries
    what = "weights before and in training, gradient, Adam"
    return [Item(what, "5 x 4 E", size, DEVICE, "target values", "solve")]


def _mend(hparams: Any, sizes: Sizes) -> list[Item]:
    from sphere.baselines.mend.networks import MendEditor

    with torch.device("meta"):
        editor = MendEditor(dict(enumerate(sizes.edited)), hparams.rank, hparams.edit_lr)
    size = sum(tensor.nbytes for tensor in editor.state_dict().values())
    updates = FLOAT32 * sizes.entries
    return [
        Item("the editor's networks", "of hparams' rank", size, DEVICE, "preparation", "writing"),
        Item("all layers' updates", "4 E", updates, DEVICE, "solve", "writing"),
    ]


def _ultraedit(hparams: Any, sizes: Sizes) -> list[Item]:
    size = FLOAT64 * sizes.num_edits * sum(out + in_features for out, in_features in sizes.edited)
    rows, formula = "inputs and gradients of the edited modules", "8 n (in + out) for a token of each answer"
    return [
        Item(rows, formula, size, DEVICE, "target values", "solve"),
        Item("a layer's update", "8 out in", FLOAT64 * sizes.largest, DEVICE, "solve", "writing"),
    ]


def _unknown(hparams: Any, sizes: Sizes) -> list[Item]:
    updates = Item("all layers' updates", "8 E", FLOAT64 * sizes.entries, DEVICE, "solve", "writing")
    return [*(second_moments(sizes) if isinstance(hparams, HParams) else []), updates]


def _unknown_solve(hparams: Any, sizes: Sizes) -> float:
    """Delta = R X^T alone."""
    return sum(2 * out * in_features * sizes.num_edits for out, in_features in sizes.edited)


DEFAULT = MethodMemory(_unknown, _unknown_solve)
METHODS: dict[str, MethodMemory] = {
    "AlphaEdit": MethodMemory(_alphaedit, _sequential_solve),
    "BetaEdit": MethodMemory(_betaedit, _sequential_solve),
    "FT": MethodMemory(_ft),
    "LyapLock": MethodMemory(_lyaplock, _lyaplock_solve),
    "MEMIT": MethodMemory(_memit, _memit_solve),
    "MEMIT_prune": MethodMemory(_prune, _memit_solve),
    "MEMIT_rect": MethodMemory(_rect, _memit_solve),
    "MEMIT_seq": MethodMemory(_memit_seq, _sequential_solve),
    "MEND": MethodMemory(_mend),
    "ROME": MethodMemory(_rome),
    "UltraEdit": MethodMemory(_ultraedit),
}
