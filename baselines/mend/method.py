"""MEND as an editing method: a trained editor turns the gradient of a batch into its updates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sphere.errors import SphereError
from sphere.hparams import ModuleHParams, require
from sphere.methods.base import Method, Update, Workspace
from sphere.methods.ft import TeacherForcing
from sphere.requests import EditRequest
from sphere.runs.memory import DEVICE, FLOAT32, Item, Sizes

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

    @classmethod
    def memory(cls, hparams: MendHParams, sizes: Sizes) -> list[Item]:
        with torch.device("meta"):
            editor = MendEditor(dict(enumerate(sizes.edited)), hparams.rank, hparams.edit_lr)
        size = sum(t.nbytes for t in editor.state_dict().values())
        updates = FLOAT32 * sizes.entries
        return [
            Item("the editor's networks", "of hparams' rank", size, DEVICE, "preparation", "writing"),
            Item("all layers' updates", "4 E", updates, DEVICE, "solve", "writing"),
        ]

    def __init__(self, workspace: Workspace, hparams: MendHParams) -> None:
        super().__init__(workspace, hparams)
        self.editor: MendEditor | None = None

    def prepare(self) -> None:
        if self.editor is None:
            path = editor_path(self.hparams, self.workspace.stats_dir, self.workspace.model_label)
            self.editor = load_editor(path, self.workspace, self.hparams)

    @torch.no_grad()
    def updates(self, requests: Sequence[EditRequest]) -> Iterator[Update]:
        self.prepare()
        assert self.editor is not None
        space = self.workspace
        pairs = [(request.text, request.target_new) for request in requests]
        factors = rank_one_factors(TeacherForcing.of(space.stack, space.tokenizer, pairs), space.stack)
        for layer, delta in self.editor(factors).items():
            yield space.stack.weight_name(layer), self.hparams.lr_scale * delta


def editor_path(hparams: MendHParams, stats_dir: Path, model_label: str) -> Path:
    """Where a model's trained editor is kept."""
    return Path(hparams.editor) if hparams.editor else Path(stats_dir) / model_label / FILE_NAME


def edited_shapes(workspace: Workspace) -> dict[int, Shape]:
    """layer -> (out, in) of its edited weight."""
    shapes = {}
    for layer in workspace.hparams.layers:
        out_features, in_features = workspace.weights.get(workspace.stack.weight_name(layer)).shape
        shapes[layer] = (out_features, in_features)
    return shapes


def load_editor(path: Path, workspace: Workspace, hparams: MendHParams) -> MendEditor:
    """The trained editor of a model, on its device.

    Raises:
        SphereError: there is none (the sentence gives the command that trains one), or it fits other weights.
    """
    if not path.exists():
        raise SphereError(
            f"MEND has no trained editor at {path}: train one with `python -m baselines.mend.train "
            f"model_name={workspace.model_label}` (a model in a folder: its path)."
        )
    editor = MendEditor.load(path)
    wanted = edited_shapes(workspace)
    if editor.shapes != wanted:
        raise SphereError(
            f"The MEND editor at {path} was trained for weights (layer: out x in) {_show(editor.shapes)}, but the "
            f"hyperparameters name {_show(wanted)}: train again with `python -m baselines.mend.train "
            f"model_name={workspace.model_label}`."
        )
    log.info("MEND editor: %s", path)
    return editor.to(workspace.stack.device).eval()


def _show(shapes: dict[int, Shape]) -> str:
    return ", ".join(f"{layer}: {out} x {in_features}" for layer, (out, in_features) in shapes.items())
