"""What a method is.

A method turns a batch of requests into weight updates. It does not write them: it yields (weight name, Delta), the
editing loop passes Delta through the update rules, writes it and comes back for the next one. So a method that solves
layer after layer on the weights edited so far (AlphaEdit) and one that solves all layers first (MEMIT) have the same
shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sphere.factors import Factors
from sphere.hparams import ModuleHParams
from sphere.methods.delivery import Delivery
from sphere.methods.edited_model import EditedModel
from sphere.methods.services import Services
from sphere.requests import EditRequest
from sphere.rules import RuleSet, sphere_rules
from sphere.strength import OrAuto

Update = tuple[str, Tensor]

TARGET_NUMBERS = ("v_lr", "clamp_norm_factor", "kl_factor")  # of target values, that are searched


class Method(ABC):
    """A weight-update solver and the rules that its updates pass.

    A subclass says its name, its reference and its hyperparameters' class, and yields updates.

    Args:
        edited: the model under edit.
        services: target values, keys, second moments of it.
        hparams: of `hparams_class`.

    Attributes:
        name: what it is asked for by, and the name of its folder of hyperparameter files.
        reference: the paper.
        hparams_class: dataclass of its hyperparameters.
        default_alpha: suppression strength of the SPHERE hook unless one is given (the paper's).
        solves_first: whether all updates of a batch are found before the first one is written.
        at_once: facts whose target values are found together; None: a whole batch.
        uses_subject: whether it must know where in its prompt a fact's subject is.
        tuned: its numbers that `sphere.tuning` searches; they must be among those of `sphere.tuning.search_space`.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    hparams_class: ClassVar[type[ModuleHParams]]
    default_alpha: ClassVar[float] = 0.8
    solves_first: ClassVar[bool] = False
    at_once: ClassVar[int | None] = None
    uses_subject: ClassVar[bool] = True
    tuned: ClassVar[tuple[str, ...]] = ()

    def __init__(self, edited: EditedModel, services: Services, hparams: Any) -> None:
        self.edited, self.services, self.hparams = edited, services, hparams

    @classmethod
    def rules(cls, hparams: Any, beta_hse: OrAuto, alpha: OrAuto) -> RuleSet:
        """The update rules of this method: by default the SPHERE hook on each update."""
        return RuleSet(each=sphere_rules(beta_hse, alpha))

    def prepare(self) -> None:  # noqa: B027 (optional)
        """Whatever must be computed on the unedited model before the first batch."""

    def prepared_from(self) -> dict[str, str]:
        """What `prepare` has read beside the model, name -> digest: a continued run must find the same."""
        return {}

    @abstractmethod
    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        """Yield (weight name, Delta (out x in)) for a batch; each is written before the next one is asked for."""

    def delivered(self) -> Mapping[str, Delivery]:
        """What the updates of the batch just written did to the outputs that z asks for, weight name -> metrics.

        Those of `sphere.methods.delivery`; nothing for a method without target values.
        """
        return {}

    def factors(self) -> Factors | None:
        """L (out x n) and R (in x n) of the update that was yielded last, Delta = L R^T; asked for before the next one.

        A column for each request of the batch, in their order, over all updates of a weight; None, for a method whose
        updates are no sums over facts.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """What the method carries from batch to batch, for a resume point; asked for between batches only.

        What was returned under a name once must stay the same: a resume point writes new names only, and drops those
        that are no longer returned. State that changes takes a new name with each batch.
        """
        return {}

    def keep_state(self, names: Collection[str]) -> None:  # noqa: B027 (optional)
        """Forget whatever `state` returns under other names: the batch that brought it was not written."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (optional)
        """Take up a saved state; `prepare` was called before."""


def spread_residual(targets: Tensor, outputs: Tensor, layers_left: int) -> Tensor:
    """R = (Z - Z_now) / layers left: the part of what is missing that this layer shall write (MEMIT, eq. 20).

    Args:
        targets: Z (out x n).
        outputs: Z_now (out x n).
        layers_left: this layer included.
    """
    return (targets - outputs.to(targets)) / layers_left
