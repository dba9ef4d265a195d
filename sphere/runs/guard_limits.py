"""How far a run may move what its guard watches, before it is stopped: the names, what they mean, and the defaults.

The defaults come from runs of the default model; docs/guard.md shows them. Knows numbers and words, and is imported
without PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sphere.errors import SphereError


@dataclass(frozen=True)
class Limit:
    """One thing that is watched; larger is worse.

    Attributes:
        default: the largest value that lets a run go on.
        means: what the number is, as a sentence's part.
    """

    default: float
    means: str


LIMITS = {
    "perplexity": Limit(3.0, "the perplexity of the fixed text, as a multiple of the unedited model's"),
    "control": Limit(
        2.0, "what the answers to the control prompts lost in log-likelihood, in nats per token"
    ),
    "edits": Limit(0.25, "how far the fraction of the sampled edits that hold fell below the run's highest"),
    "energy": Limit(0.01, "the largest relative change of an edited weight's hyperspherical energy"),
    "spectrum": Limit(4.0, "the largest factor by which an edited weight's condition number grew"),
}


def parse_limits(text: str | None) -> dict[str, float]:
    """Name -> limit; the defaults, but for those that a text such as "perplexity=2,energy=inf" names; "none": no limit.

    Raises:
        SphereError: no such text, an unknown name, or a limit that is no positive number.
    """
    limits = {name: limit.default for name, limit in LIMITS.items()}
    if text == "none":
        return dict.fromkeys(LIMITS, math.inf)
    for part in (text or "").split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if name not in LIMITS or not equals:
            raise SphereError(
                f"guard_limits are NAME=NUMBER, separated by commas, of {', '.join(LIMITS)}; got '{part.strip()}'.",
                argument="guard_limits",
            )
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = math.nan
        if not limits[name] > 0:
            raise SphereError(
                f"The limit of {name} is a number above 0, or inf for none; got '{number}'.",
                argument="guard_limits",
            )
    return limits


def passed(moved: Mapping[str, float | None], limits: Mapping[str, float]) -> list[str]:
    """The names of what is beyond its limit; what could not be measured (None) is not."""
    return [
        name for name, limit in limits.items() if (value := moved.get(name)) is not None and value > limit
    ]
