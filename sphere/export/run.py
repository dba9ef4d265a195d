"""The way from a run to a folder: load the edited model, write it, load that again, compare, and give it its name.

The folder has its name only when all that is done; until then, and after any failure, there is nothing at its place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from sphere.checkpoints import read_config
from sphere.errors import SphereError
from sphere.export.card import card
from sphere.export.checks import Comparison, check_same, questions_of
from sphere.export.edited import EditedRun, load_edited
from sphere.export.gguf import GgufForm
from sphere.export.gguf_file import came_as_gguf
from sphere.export.hf import SHARD_SIZE, HuggingFaceFolder
from sphere.export.peft import PeftAdapter
from sphere.files import atomic_folder

log = logging.getLogger(__name__)

# Form -> the options that it has a use for.
USES = {"hf": ("dtype", "shard_size"), "peft": ("dtype", "rank"), "gguf": ("quant", "adapter", "rank")}
FORMS = tuple(USES)
CARD_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is asked of an export beside its form.

    Attributes:
        dtype: hf, peft: of the weights that are written; None: as the model was edited, and float32 for adapters.
        shard_size: the largest size of one of hf's files; None: 5GB.
        rank: of an adapter, peft's or gguf's; None: the edits' own, which is exact.
        quant: gguf: type of the edited tensors; None: their own in the file, and f32 for adapters.
        adapter: gguf: a LoRA adapter although the model came as GGUF.
    """

    dtype: str | None = None
    shard_size: str | None = None
    rank: int | None = None
    quant: str | None = None
    adapter: bool = False


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        folder: where it is.
        n_edits: how many edits are in it.
        made: sentences on what was written.
        comparison: with the edited model.
    """

    folder: Path
    n_edits: int
    made: list[str]
    comparison: Comparison


class Form(Protocol):
    """One way of writing an edited model."""

    def write(self, run: EditedRun, folder: Path) -> list[str]:
        """Write it into a folder, leave the run's model with the weights as they were written; what there is to say."""

    def read(self, run: EditedRun, folder: Path, device: str, device_map: str | None) -> PreTrainedModel:
        """The model that was written, from its files; the run's own model may be given up or used for it."""

    def title(self) -> str:
        """What was written, in a few words."""

    def usage(self, run: EditedRun, out: str) -> str:
        """How it is loaded, as Markdown."""


def export_run(
    folder: str | Path,
    form: str,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    checkpoint: int | None = None,
    model_name: str | None = None,
    device: str = "auto",
    device_map: str | None = None,
) -> Export:
    """Write a run's edited model in a form that other programs read, and check it.

    Args:
        folder: a run's, as `sphere.runs.run.execute` wrote it.
        form: one of `FORMS`.
        out: a folder that is not there yet.
        checkpoint: number of edits; None: the last, 0: the unedited model.
        model_name: the unedited model, where it is no longer where run.json says.

    Raises:
        SphereError: bad options or one that the form has no use for, no such checkpoint, a base model that is not at
            hand, something at `out` already, a full disk, or an export that is not what was written; nothing is left at
            `out`.
    """
    options = options or ExportOptions()
    writer, out = _form(form, options), Path(out)
    _check_rank(form, options, model_name or read_config(folder).get("model_name"))
    with atomic_folder(out) as temporary:
        run = load_edited(folder, checkpoint, model_name=model_name, device=device, device_map=device_map)
        questions = questions_of(run)
        edited = questions.ask(run.model, run.tokenizer)
        made = writer.write(run, temporary)
        written = questions.ask(run.model, run.tokenizer, facts=False)
        log.info("%s is written; it is loaded again and compared.", form)
        model = writer.read(run, temporary, device, device_map)
        exported = questions.ask(model, run.tokenizer)
        check_same(written, exported, model.dtype, f"The {form} export")
        comparison = questions.compare(edited, exported)
        usage = writer.usage(run, str(out))
        text = card(run, writer.title(), made, comparison.lines(), usage)
        (temporary / CARD_NAME).write_text(text, "utf-8")
    return Export(out, run.n_edits, made, comparison)


def _form(name: str, options: ExportOptions) -> Form:
    """The writer of a form.

    Raises:
        SphereError: an unknown form, or an option that it has no use for.
    """
    if name not in FORMS:
        raise SphereError(f"Unknown form '{name}': use one of {', '.join(FORMS)}.", argument="to")
    given = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    if useless := [option for option in given if option not in USES[name]]:
        raise SphereError(
            f"An export to {name} has no use for {', '.join(useless)}, only for {', '.join(USES[name])}: leave that "
            "out, or choose another form.",
            argument=(*useless, "to"),
        )
    if name == "hf":
        return HuggingFaceFolder(options.dtype, options.shard_size or SHARD_SIZE)
    if name == "peft":
        return PeftAdapter(options.rank, options.dtype)
    return GgufForm(options.quant, options.adapter, options.rank)


def _check_rank(form: str, options: ExportOptions, model_name: str | None) -> None:
    """A rank is one of an adapter."""
    copied = form == "gguf" and not options.adapter and model_name is not None and came_as_gguf(model_name)
    if copied and options.rank is not None:
        raise SphereError(
            "The model came as GGUF and becomes a copy of its file, which has no rank: leave that out, or ask for an "
            "adapter.",
            argument=("rank", "adapter"),
        )
