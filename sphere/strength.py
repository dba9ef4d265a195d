"""How strong SPHERE is: its two numbers, and "auto", by which each weight and each update sets its own.

`alpha` "auto" is the smallest suppression with which what editing has put into a weight's principal directions stays
within a budget; r under `beta_hse` "auto" is in `sphere.cuts`. Knows tensors only, and is imported without PyTorch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sphere.errors import SphereError

if TYPE_CHECKING:
    from torch import Tensor

AUTO: Literal["auto"] = "auto"
OrAuto = float | Literal["auto"]
ALPHA_BUDGET = 1e-3  # outputs change by 3 % (its root) for inputs in the principal directions


class Strength(NamedTuple):
    """What `alpha` "auto" comes to: the suppression, and the change of the principal part that it leaves."""

    alpha: float
    change: float


def strength_within(
    budget: float, inside: Tensor, weight: Tensor, original: Tensor | None, basis: Tensor, principal: float
) -> Strength:
    """The smallest alpha with which the principal part of a weight's total change stays within a budget.

    With W the weight as it stands, W_0 the unedited one, N = diag(||w_i||) the norms of W's rows and U of W_hat,

        change(alpha) = ||N^-1 (W - W_0 + (1 - alpha) Delta) U||^2 / ||W_hat U||^2  <=  budget     (Frobenius):

    of what the neurons have in the principal directions, so much has been put there by editing. With
    A = N^-1 (W - W_0) U and B = N^-1 Delta U (out x r) it is a quadratic in 1 - alpha, whose larger root is taken.
    Where no alpha is large enough (the directions may have turned to what earlier edits wrote), the one of the least
    change.

    Args:
        budget: 0 or more; infinite: alpha is 0.
        inside: Delta U (out x r).
        weight: W (out x in).
        original: W_0 (out x in); a rule has it from `for_weight`.
        basis: U (in x r), orthonormal columns.
        principal: the fraction of the spectrum that they carry: ||W_hat U||^2 / ||W_hat||^2 of U's weight.

    Raises:
        SphereError: no W_0.
    """
    if original is None:
        raise SphereError("alpha 'auto' measures against the unedited weight: call for_weight first.")
    norms = weight.norm(dim=1, keepdim=True).to(basis)  # out x 1
    scale = (1 / norms).where(norms > 0, norms)  # a row of zeros has no direction
    earlier = ((weight - original.to(weight)).to(basis) @ basis * scale).double()  # A (out x r)
    added = (inside.to(basis) * scale).double()  # B (out x r)
    whole = principal * int((norms > 0).sum())  # ||W_hat U||^2
    a, ab, b = (float((x * y).sum()) for x, y in ((earlier, earlier), (earlier, added), (added, added)))
    kept = _largest_kept(a, ab, b, budget * whole)
    return Strength(1.0 - kept, max(a + 2 * kept * ab + kept**2 * b, 0.0) / whole)


def _largest_kept(a: float, ab: float, b: float, bound: float) -> float:
    """The largest s in [0, 1] with a + 2 s ab + s^2 b <= bound, or the one of the least value where there is none."""
    if a + 2 * ab + b <= bound or b == 0:
        return 1.0
    inside = ab**2 - b * (a - bound)
    if inside >= 0 and (root := (math.sqrt(inside) - ab) / b) >= 0 and (math.sqrt(inside) + ab) / b >= -1:
        return min(root, 1.0)
    return min(max(-ab / b, 0.0), 1.0)


def check_beta(beta_hse: OrAuto) -> None:
    """`beta_hse` is a ratio; 0 stands for "no projection", "auto" for the number of directions above the noise.

    Raises:
        SphereError: it is neither.
    """
    _check_unit("beta_hse", "a cumulative ratio between 0 and 1", beta_hse)


def check_alpha(alpha: OrAuto) -> None:
    """`alpha` says how much of the principal part is taken away; "auto": as much as the budget asks for.

    Raises:
        SphereError: it is no such number.
    """
    _check_unit("alpha", "a suppression strength from 0 to 1", alpha)


def _check_unit(name: str, what: str, value: OrAuto) -> None:
    """A number from 0 to 1, or "auto"."""
    if value != AUTO and (isinstance(value, str) or not 0 <= value <= 1):
        raise SphereError(f"{name} is {what}, or '{AUTO}', got {value!r}: correct it.", argument=name)


def check_budget(budget: float) -> None:
    """`alpha_budget` is the fraction of the principal part that editing may put there.

    Raises:
        SphereError: it is negative or not a number.
    """
    if isinstance(budget, str) or not budget >= 0:
        raise SphereError(
            f"alpha_budget is a fraction of the principal part, 0 or more, got {budget!r}: correct it.",
            argument="alpha_budget",
        )


def in_words(value: Any) -> str:
    """A number of SPHERE's as tables and folders show it: 0.5, or auto."""
    return value if isinstance(value, str) else f"{value:g}"
