"""The way from a run to a folder: load the edited model, write it, load that again, compare, and give it its name.

The folder has its name only when all that is done; until then, and after any failure, there is nothing at its place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from sphere.errors import SphereError
from sphere.export.card import card
from sphere.export.checks import Comparison, check_same, questions_of
from sphere.export.edited import EditedRun, load_edited
from sphere.export.gguf import GgufForm
from sphere.export.hf import SHARD_SIZE, HuggingFaceFolder
from sphere.export.peft import PeftAdapter
from sphere.files import atomic_folder

log = logging.getLogger(__name__)

FORMS = ("hf", "peft", "gguf")
CARD_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is asked of an export beside its form.

    Attributes:
        dtype: of the weights that are written; None: as the model was edited, and float32 for adapters.
        shard_size: the largest size of one of hf's files.
        rank: of an adapter; None: the edits' own, which is exact.
        quant: gguf: type of the edited tensors; None: their own in the file, and f32 for adapters.
        adapter: gguf: a LoRA adapter although the model came as GGUF.
    """

    dtype: str | None = None
    shard_size: str = SHARD_SIZE
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
        SphereError: bad options, no such checkpoint, a base model that is not at hand, something at `out` already, a
            full disk, or an export that is not what was written; nothing is left at `out`.
    """
    options = options or ExportOptions()
    writer, out = _form(form, options), Path(out)
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
    if name == "hf":
        return HuggingFaceFolder(options.dtype, options.shard_size)
    if name == "peft":
        return PeftAdapter(options.rank, options.dtype)
    if name == "gguf":
        return GgufForm(options.quant, options.adapter, options.rank)
    raise SphereError(f"Unknown form '{name}': use one of {', '.join(FORMS)}.", argument="to")
