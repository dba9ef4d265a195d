"""The states of a run's model that are scored, and the key of whatever is measured on them.

Every scoring goes through here: of edits, of generated text, of downstream tasks and by lm-evaluation-harness. The
model is checked against the one that the run started from, once; then it is put into each state in turn. A result is
kept with the key of what made it and is used again under an equal one only. A key holds the weights as they stand, all
of them; architecture, configuration and dtypes of the model; the tokenizer; and the settings of what was measured. How
passes are cut, the device and the versions of libraries change the rounding only, and are no part of it.

Knows checkpoints and models. Knows nothing of what is measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import CONFIG_NAME, Checkpoint, list_checkpoints, read_config, read_weights
from sphere.errors import SphereError
from sphere.fingerprint import Fingerprint
from sphere.forward.numerics import computation
from sphere.weights import EditedWeights

log = logging.getLogger(__name__)

SAME_WEIGHTS = 1e-2  # relative: the original weights in bfloat16 against float32 differ by less
Key = dict[str, Any]


@dataclass(frozen=True)
class State:
    """The model as it stands.

    Attributes:
        n_edits: how many edits are in its weights.
        checkpoint: where they come from; None: the unedited model.
        key: JSON-able; equal only for models that compute the same, but for rounding, from the same text.
    """

    n_edits: int
    checkpoint: Checkpoint | None
    key: Key

    @property
    def label(self) -> str:
        """edit_<n>."""
        return f"edit_{self.n_edits}"

    def digest(self, **settings: Any) -> str:
        """A short key of a result: this state, measured with these (JSON-able) settings."""
        content = json.dumps({"state": self.key, "settings": settings}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class RunStates:
    """The unedited model, then each checkpoint of a run, all in one model.

    Args:
        model: the unedited model that the run started from, in whatever dtype it is to be scored.
        folder: a run's folder, with `edit_<n>` files and (unless published .pth files) `run.json`.
        only: numbers of edits of the checkpoints that count (default: all).

    Attributes:
        note: a sentence on what could not be verified of the model; None: it is the run's own.

    Raises:
        SphereError: no checkpoints, or a model that is not the one that the run started from.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
        only: Sequence[int] | None = None,
    ) -> None:
        checkpoints = list_checkpoints(folder)
        self.checkpoints = [c for c in checkpoints if c.n_edits and (only is None or c.n_edits in only)]
        self._model, self._first = model, checkpoints[0]
        first = self._first
        self._weights = _weights(model, first)
        self._original = self._weights.stored() if first.n_edits else None
        self._fingerprint = Fingerprint(model, self._weights.names)
        self._constant = {**computation(model), "tokenizer": tokenizer_digest(tokenizer)}
        self.unedited = self._state(None)
        self.note = self._check_model(read_config(folder), first, Path(folder))
        if self.note:
            log.warning("%s", self.note)

    def __iter__(self) -> Iterator[State]:
        """Put the model into each state, the unedited one (as it stands at first) first; see `temporarily`."""
        yield self.unedited
        for checkpoint in self.checkpoints:
            saved = read_weights(checkpoint.path)
            try:
                self._weights.restore(saved)
            except SphereError as error:
                raise SphereError(f"Checkpoint {checkpoint.path}: {error}") from error
            yield self._state(checkpoint)

    def original(self) -> dict[str, Tensor]:
        """The edited weights before all editing, by name (out x in): those of edit_0, else the model's own."""
        stored = self._original or read_weights(self._first.path)
        return {name: self._weights.canonical(name, weight) for name, weight in stored.items()}

    def canonical(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The weights of a checkpoint, by name (out x in)."""
        return {n: self._weights.canonical(n, w) for n, w in read_weights(checkpoint.path).items()}

    def temporarily(self, device: str | None = None) -> AbstractContextManager[None]:
        """Within the block the model may be put into other states; `device` keeps the original weights meanwhile."""
        return self._weights.temporarily(device)

    def _state(self, checkpoint: Checkpoint | None) -> State:
        key = {"weights": self._fingerprint.now(), **self._constant}
        return State(checkpoint.n_edits if checkpoint else 0, checkpoint, key)

    def _check_model(self, config: dict[str, Any], first: Checkpoint, folder: Path) -> str | None:
        """Refuse another model than the run's; say what cannot be known."""
        original, name = config.get("model"), str(config.get("model_dtype")).removeprefix("torch.")
        dtype = getattr(torch, name, None)
        if original is None or not isinstance(dtype, torch.dtype):
            return _unverified(
                f"no {CONFIG_NAME} has the fingerprint of the one that the run started from", first
            )
        if self._model.dtype == dtype:
            same, decided = original == self.unedited.key["weights"], True
        else:
            same = original == Fingerprint(self._model, dtype=dtype).now()
            decided = _rounds_to(self._model, dtype)
        if same:
            return None
        if decided:
            raise SphereError(
                f"{_described(self._model)} is not the model that the run in {folder} started from (its weights have "
                f"another fingerprint than {CONFIG_NAME} says): give that one.",
                argument="model_name",
            )
        own = str(self._model.dtype).removeprefix("torch.")
        return _unverified(f"it is scored in {own} and the run started in {name}", first)


def _unverified(why: str, first: Checkpoint) -> str:
    known = (
        "there is no edit_0 to compare it with"
        if first.n_edits
        else "of its weights, edit_0 holds the edited ones only"
    )
    return f"The model could not be verified: {why}, and {known}."


def _weights(model: Any, first: Checkpoint) -> EditedWeights:
    """The weights that the run edits; they must fit its first checkpoint, and equal the original ones."""
    saved = read_weights(first.path)
    other = f"The checkpoint {first.path} is of another model than {_described(model)}"

    def refuse(reason: str) -> SphereError:
        return SphereError(
            f"{other} ({reason}): give the model that the run started from.", argument="model_name"
        )

    try:
        weights = EditedWeights(model, list(saved))
    except SphereError as error:
        raise refuse(str(error).split(":")[0]) from error
    for name, own in weights.stored().items():
        if saved[name].shape != own.shape:
            raise refuse(f"'{name}' has shape {tuple(saved[name].shape)} there, {tuple(own.shape)} here")
        if first.n_edits == 0:
            distance = _relative_distance(saved[name], own)
            if not distance <= SAME_WEIGHTS:
                raise refuse(f"'{name}' differs by {100 * distance:.1f} % before any edit")
    return weights


def _relative_distance(saved: Tensor, own: Tensor) -> float:
    return float((saved.float() - own.float()).norm() / own.float().norm())


def _rounds_to(model: Any, dtype: torch.dtype) -> bool:
    """Whether the model, cast to a dtype, is what loading it in that dtype gives."""
    kept = any(
        getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return not kept and len(dtypes) == 1 and torch.finfo(dtypes.pop()).bits > torch.finfo(dtype).bits


def _described(model: Any) -> str:
    return f"{type(model).__name__} '{getattr(model.config, 'name_or_path', '')}'"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that decides how texts become token ids and back."""
    if tokenizer.is_fast:
        content: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {
            k: v for k, v in content.items() if k not in ("padding", "truncation")
        }  # of the latest call
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    text = json.dumps([content, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
