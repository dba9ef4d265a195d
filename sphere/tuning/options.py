"""What decides a tuning beside the settings of the runs that it is for. Knows numbers and paths only."""

from __future__ import annotations

from dataclasses import dataclass

from sphere.errors import SphereError


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How layers and numbers are sought.

    Attributes:
        from_hparams: a file whose numbers to start from; None: the hyperparameters that a run would use.
        layers: the layers to edit; None: found by causal tracing.
        mom2_dataset, mom2_n_samples: the corpus of second moments in place of the start's.
        n_facts: facts of the tuning set.
        n_trials: trials in all, those of earlier sessions included.
        timeout_minutes: no trial begins that would end later after the start of the command; None: no limit.
        max_perplexity: perplexity of the fixed text, relative to the unedited model's, above which a score is reduced.
        trace_table: the table of facts that tracing draws from (the form of data/starter_facts.json).
        trace_facts: known facts that are traced, at most.
        trace_draws: draws of noise for each of them.
    """

    from_hparams: str | None = None
    layers: tuple[int, ...] | None = None
    mom2_dataset: str | None = None
    mom2_n_samples: int | None = None
    n_facts: int = 40
    n_trials: int = 12
    timeout_minutes: float | None = 25.0
    max_perplexity: float = 1.2
    trace_table: str = "data/starter_facts.json"
    trace_facts: int = 40
    trace_draws: int = 5

    def __post_init__(self) -> None:
        for name in ("n_facts", "n_trials", "trace_facts", "trace_draws", "mom2_n_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SphereError(f"{name} must be at least 1, got {value}.", argument=name)
        if self.timeout_minutes is not None and not self.timeout_minutes > 0:
            raise SphereError(
                f"timeout_minutes must be positive, got {self.timeout_minutes:g}.", argument="timeout_minutes"
            )
        if not self.max_perplexity >= 1:
            raise SphereError(
                f"max_perplexity is a factor of at least 1, got {self.max_perplexity:g}.",
                argument="max_perplexity",
            )
