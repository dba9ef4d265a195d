"""MEND as an editing method: a trained editor turns the gradient of a batch into its updates."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sphere.errors import SphereError
from sphere.hparams import ModuleHParams, require
from sphere.methods.base import Method, Update
from sphere.methods.edited_model import EditedModel
from sphere.methods.services import Services
from sphere.methods.teacher_forcing import TeacherForcing
from sphere.requests import EditRequest
from sphere.values.joiner import Continued

from .factors import rank_one_factors
from .networks import MendEditor, Shape

log = logging.getLogger(__name__)

FILE_NAME = "mend.safetensors"


@dataclass(frozen=True, kw_only=True)
class MendHParams(ModuleHParams):
    """MEND's keys.

    Attributes:
        rank: of the networks' low-rank maps.
        edit_lr: edit rate of each layer before training.
        lr_scale: factor on the trained edit rates when editing.
        editor: file of the trained editor; null for the one that training writes, beside the model's statistics.
    """

    rank: int
    edit_lr: float
    lr_scale: float = 1.0
    editor: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("rank", "edit_lr", "lr_scale"))


class MEND(Method):
    """Delta_l = -alpha_l sum_t delta~_t u~_t^T, with (u~, delta~) = g(u, delta) by the trained editor g (section 3).

    u and delta are the rank-one factors of the gradient of the requests' loss on the weights as they stand; a batch's
    updates are found together.
    """

    name = "MEND"
    reference = "Fast Model Editing at Scale, arXiv 2110.11309"
    hparams_class = MendHParams
    uses_subject = False

    def __init__(self, edited: EditedModel, services: Services, hparams: MendHParams) -> None:
        super().__init__(edited, services, hparams)
        self.editor: MendEditor | None = None

    @property
    def path(self) -> Path:
        """Where the trained editor is."""
        return editor_path(self.hparams, self.services.stats_dir, self.services.model_label)

    def prepare(self) -> None:
        if self.editor is None:
            self.editor = load_editor(self.path, self.edited, self.services.model_label)

    def prepared_from(self) -> dict[str, str]:
        with self.path.open("rb") as file:
            return {"trained_editor": hashlib.file_digest(file, "sha256").hexdigest()}

    @torch.no_grad()
    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        assert self.editor is not None
        stack, tokenizer = self.edited.stack, self.edited.tokenizer
        pairs = [Continued(self.edited.asked(r.text), r.target_new, r.joiner) for r in requests]
        factors = rank_one_factors(TeacherForcing.of(stack, tokenizer, pairs), stack)
        for layer, delta in self.editor(factors).items():
            yield self.edited.weight_name(layer), self.hparams.lr_scale * delta


def editor_path(hparams: MendHParams, stats_dir: Path, model_label: str) -> Path:
    """Where a model's trained editor is kept."""
    return Path(hparams.editor) if hparams.editor else Path(stats_dir) / model_label / FILE_NAME


def edited_shapes(edited: EditedModel) -> dict[int, Shape]:
    """layer -> (out, in) of its edited weight."""
    shapes = {}
    for layer in edited.hparams.layers:
        out_features, in_features = edited.weight(layer).shape
        shapes[layer] = (out_features, in_features)
    return shapes


def load_editor(path: Path, edited: EditedModel, model_label: str) -> MendEditor:
    """The trained editor of a model, on its device.

    Args:
        model_label: names the model in errors.

    Raises:
        SphereError: there is none (the sentence gives the command that trains one), or it fits other weights.
    """
    if not path.exists():
        raise SphereError(
            f"MEND has no trained editor at {path}: train one with `python -m sphere.baselines.mend.train "
            f"model_name={model_label}` (a model in a folder: its path)."
        )
    editor = MendEditor.load(path)
    wanted = edited_shapes(edited)
    if editor.shapes != wanted:
        raise SphereError(
            f"The MEND editor at {path} was trained for weights (layer: out x in) {_show(editor.shapes)}, but the "
            f"hyperparameters name {_show(wanted)}: train again with `python -m sphere.baselines.mend.train "
            f"model_name={model_label}`."
        )
    log.info("MEND editor: %s", path)
    return editor.to(edited.device).eval()


def _show(shapes: dict[int, Shape]) -> str:
    return ", ".join(f"{layer}: {out} x {in_features}" for layer, (out, in_features) in shapes.items())
