"""Training of MEND's editor (Mitchell et al. 2022, section 3.2 and algorithm 1).

Each step draws some records, edits all of them at once with the editor as it is, and asks of the edited model that it
gives the new targets in other words, and everything else as before:

    L = c_edit * mean NLL(target_new | rephrased prompt) + c_loc * mean KL(before || after on neighborhood prompts)

The factors of the gradient are constants, so no second derivatives are needed. The layers below the
edited ones never change: what they put out is computed once per chunk of records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.forward.modules import inference
from sphere.hparams import require
from sphere.methods.edited_model import EditedModel
from sphere.methods.teacher_forcing import TeacherForcing
from sphere.values.joiner import Continued

from .factors import rank_one_factors
from .method import MendHParams, edited_shapes
from .networks import MendEditor

log = logging.getLogger(__name__)

LOG_EVERY = 20  # steps that a reported mean runs over


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        steps: number of edited batches.
        num_edits: records edited at once in a step; the editor is best at batches of about this size.
        lr: Adam's learning rate of the networks.
        lr_lr: the same of the logarithms of the edit rates.
        c_edit, c_loc: weights of the two parts of the loss.
        grad_clip: largest norm of the gradient.
        chunk_records: records whose lower layers' outputs are held at once.
        neighbors: neighborhood prompts per record that locality is asked on.
        seed: of the draws and the networks' initial values.
    """

    steps: int = 300
    num_edits: int = 20
    lr: float = 1e-3
    lr_lr: float = 1e-2
    c_edit: float = 0.1
    c_loc: float = 1.0
    grad_clip: float = 100.0
    chunk_records: int = 64
    neighbors: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("steps", "num_edits", "lr", "lr_lr", "grad_clip", "chunk_records", "neighbors")
        require(self, positive=positive, not_negative=("c_edit", "c_loc", "seed"))


@dataclass
class Trained:
    """A trained editor and how its loss went: per LOG_EVERY steps the means of loss, edit and locality."""

    editor: MendEditor
    curve: list[dict[str, float]] = field(default_factory=list)


class _Rows:
    """Prompts of a chunk's records, several of each record, of which some are drawn."""

    def __init__(self, edited: EditedModel, pairs: Sequence[Sequence[Continued]]) -> None:
        self.counts = torch.tensor([len(p) for p in pairs])
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        flat = [pair for group in pairs for pair in group]
        self.batch = TeacherForcing.of(edited.stack, edited.tokenizer, flat) if flat else None

    def any_of(self, chosen: Tensor) -> bool:
        """Whether any of the chosen records (n,) has a prompt."""
        return bool((self.counts[chosen] > 0).any())

    def draw(self, chosen: Tensor, generator: torch.Generator) -> TeacherForcing:
        """One prompt of each chosen record (n,) that has any, as one of them has."""
        assert self.batch is not None
        chosen = chosen[self.counts[chosen] > 0]
        uniform = torch.rand(len(chosen), generator=generator)
        offset = (uniform * self.counts[chosen]).long()
        return self.batch.select(self.starts[chosen] + offset)


@dataclass(frozen=True)
class _Chunk:
    """Some records, ready to be drawn from."""

    n: int
    edits: _Rows
    rephrased: _Rows
    neighbors: _Rows

    @classmethod
    def of(cls, edited: EditedModel, records: Sequence[Record], neighbors: int) -> _Chunk:
        requests = [record.request for record in records]
        own = [[Continued(r.text, r.target_new, r.joiner)] for r in requests]
        others = [
            [Continued(p, r.request.target_new, r.request.joiner) for p in r.paraphrase_prompts]
            for r in records
        ]  # the equivalence neighborhood, which holds the prompt itself
        near = [
            [
                Continued(p, answer or r.request.target_true or "", r.request.joiner)
                for p, answer in r.neighborhood[:neighbors]
            ]
            for r in records
        ]
        rephrased = [a + b for a, b in zip(own, others, strict=True)]
        return cls(len(records), _Rows(edited, own), _Rows(edited, rephrased), _Rows(edited, near))


def train_editor(
    edited: EditedModel,
    hparams: MendHParams,
    records: Sequence[Record],
    settings: TrainingSettings,
    progress: bool = True,
) -> Trained:
    """Train an editor for a model on records.

    Args:
        records: with paraphrase and neighborhood prompts.
        progress: show a bar.

    Raises:
        SphereError: records without neighborhood prompts, or a loss that is not finite.
    """
    if not records or not any(r.neighborhood for r in records):
        raise SphereError("MEND needs records with neighborhood prompts: give another ds_name.")
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        editor = MendEditor(edited_shapes(edited), hparams.rank, hparams.edit_lr)
    editor.to(edited.device).train()
    adam = torch.optim.Adam(
        [
            {"params": editor.networks.parameters(), "lr": settings.lr},
            {"params": editor.log_lr.parameters(), "lr": settings.lr_lr},
        ]
    )
    curve: list[dict[str, float]] = []
    window: list[tuple[float, float]] = []
    bar = tqdm(total=settings.steps, desc="MEND", unit="step", disable=not progress)
    with inference(edited.model), torch.enable_grad():
        for step, (chunk, chosen) in enumerate(_draws(edited, records, settings, generator), 1):
            edit, local = _losses(edited, editor, chunk, chosen, generator)
            loss = settings.c_edit * edit + settings.c_loc * local
            if not torch.isfinite(loss):
                raise SphereError(
                    f"MEND's training loss is not finite at step {step}: use a smaller lr or edit_lr."
                )
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(editor.parameters(), settings.grad_clip)
            adam.step()
            window.append((float(edit.detach()), float(local.detach())))
            bar.set_postfix(edit=f"{window[-1][0]:.2f}", local=f"{window[-1][1]:.3f}", refresh=False)
            bar.update()
            if len(window) == LOG_EVERY or step == settings.steps:
                means = torch.tensor(window).mean(dim=0).tolist()
                curve.append({"step": step, "edit": means[0], "locality": means[1]})
                log.info("MEND step %d: edit loss %.3f, locality KL %.4f", step, *means)
                window.clear()
    bar.close()
    return Trained(editor.eval(), curve)


def _draws(
    edited: EditedModel, records: Sequence[Record], settings: TrainingSettings, generator: torch.Generator
) -> Iterator[tuple[_Chunk, Tensor]]:
    """(chunk, indices of the records to edit) of each step; every record comes once before any comes twice."""
    size = settings.chunk_records
    kept: dict[int, _Chunk] = {}  # small sets stay in memory whole
    order = torch.randperm(len(records), generator=generator).tolist()
    starts = list(range(0, len(records), size))
    done = 0
    while True:
        for place in torch.randperm(len(starts), generator=generator).tolist():
            group = [records[i] for i in order[starts[place] : starts[place] + size]]
            chunk = kept.get(place) or _Chunk.of(edited, group, settings.neighbors)
            if len(starts) <= 16:
                kept[place] = chunk
            for chosen in torch.randperm(chunk.n, generator=generator).split(settings.num_edits):
                yield chunk, chosen
                done += 1
                if done == settings.steps:
                    return


def _losses(
    edited: EditedModel, editor: MendEditor, chunk: _Chunk, chosen: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Edit loss and locality KL of one edited batch, with gradients of the editor; 0 KL where none has a neighbor."""
    factors = rank_one_factors(chunk.edits.draw(chosen, generator), edited.stack)
    editor.observe(factors)
    changed = {}
    for layer, delta in editor(factors).items():
        name, weight = edited.weight_name(layer), edited.weight(layer)  # out x in
        changed[name] = edited.weights.canonical(name, weight + delta.to(weight))
    edit = chunk.rephrased.draw(chosen, generator).nll(changed).mean()
    if not chunk.neighbors.any_of(chosen):
        return edit, torch.zeros_like(edit)
    near = chunk.neighbors.draw(chosen, generator)
    with torch.no_grad():
        before = F.log_softmax(near.logits(), dim=-1)  # scored x vocabulary
    after = F.log_softmax(near.logits(changed), dim=-1)
    local = F.kl_div(after, before, log_target=True, reduction="none").sum(dim=-1).mean()
    return edit, local
