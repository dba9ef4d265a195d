"""Target values z: what the last edited layer should put out at the subject's last token (ROME, eq. 4; MEMIT, eq. 14).

All requests of a batch are optimised together, and nothing is computed that cannot change the result:
positions before the lookup token are constant, so their attention keys and values are kept from one first pass;
layers up to z see no change, so the loop starts above them; logits are formed only where they are scored; a request
whose loss is small enough leaves the loop with all its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.hparams import TargetHParams
from sphere.layers import LayerStack, Recording, inference, pad_left, pad_right
from sphere.requests import EditRequest
from sphere.templates import BARE, fill, padding_id
from sphere.tokenization import encode, encode_pair, subject_token

log = logging.getLogger(__name__)

LOSS_TOLERANCE = 5e-2
ESSENCE = "{} is a"


@dataclass(frozen=True)
class TargetValues:
    """Optimised target values.

    Attributes:
        z: (n x d) target values, float32 or wider.
        h0: (n x d) unmodified outputs at the lookup position.
        losses: (n,) last loss of each request.
        steps: (n,) forward passes each request took.
    """

    z: Tensor
    h0: Tensor
    losses: Tensor
    steps: Tensor


@dataclass(frozen=True)
class _Row:
    """One sequence: its tokens, the lookup position and what is scored (nothing for the KL row)."""

    request: int
    ids: list[int]
    lookup: int
    scored: tuple[tuple[int, int], ...] = ()  # (position, label)
    bare: bool = False  # the prompt alone, without a context before it: gives h0


def compute_target_values(
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[Sequence[str]],
    hparams: TargetHParams,
    *,
    batch_tokens: int,
    progress: bool = True,
) -> TargetValues:
    """Optimise delta at the output of the last edited layer for all requests at once.

    Args:
        templates: groups of context templates with one `{}`.
        batch_tokens: how many (padded) tokens one micro-batch may hold.

    Returns:
        z (n x d) and what the optimisation did.

    Raises:
        SphereError: a subject that is not in its prompt, or a loss that is not finite (the case is named).
    """
    rows = [
        row
        for index, request in enumerate(requests)
        for row in _rows(tokenizer, index, request, [t for group in templates for t in group])
    ]
    with inference(stack.model):
        loop = _Loop(stack, hparams, requests, rows, padding_id(tokenizer), batch_tokens)
        return loop.optimise(progress)


def _rows(
    tokenizer: PreTrainedTokenizerBase, index: int, request: EditRequest, templates: Sequence[str]
) -> list[_Row]:
    """A request in every template with its target behind it, and the essence row for the KL term."""
    what, rows = f"case {request.case_id}", []
    for template in templates:
        filled = fill(template, request)
        ids, start = encode_pair(tokenizer, filled.text, request.target_new)
        lookup = subject_token(tokenizer, encode(tokenizer, filled.text), filled.subject_end, what)
        if lookup >= start:
            raise SphereError(
                f"The subject of {what} shares its last token with the target: check the prompt."
            )
        scored = tuple((position - 1, ids[position]) for position in range(start, len(ids)))
        rows.append(_Row(index, ids[:-1], lookup, scored, bare=template == BARE))
    essence = ESSENCE.format(request.subject)
    encoded = encode(tokenizer, essence)
    lookup = subject_token(tokenizer, encoded, len(request.subject), what)
    rows.append(_Row(index, encoded.ids[: lookup + 1], lookup))
    return rows


class _Pack:
    """Rows computed together: constant prefixes as a cache, and the hidden states of the suffixes below the loop."""

    def __init__(self, stack: LayerStack, rows: Sequence[_Row], pad: int, z_layer: int, last: int) -> None:
        device = stack.device
        self.bare = [(i, r.request) for i, r in enumerate(rows) if r.bare]
        prefixes = [r.ids[: r.lookup] for r in rows]
        suffixes = [r.ids[r.lookup :] for r in rows]
        before, after = max(map(len, prefixes)), max(map(len, suffixes))
        columns = torch.arange(before + after, device=device)[None]
        starts = before - torch.tensor([len(p) for p in prefixes], device=device)[:, None]
        ends = before + torch.tensor([len(s) for s in suffixes], device=device)[:, None]
        mask = ((columns >= starts) & (columns < ends)).long()  # rows x (before + after)
        positions = (columns - starts).clamp(min=0)
        inputs: dict[str, Any] = {
            "input_ids": pad_right(suffixes, after, pad, device),
            "attention_mask": mask,
            "position_ids": positions[:, before:],
            "use_cache": False,
        }
        with torch.no_grad():
            if before:
                cache = stack.fill_cache(
                    {
                        "input_ids": pad_left(prefixes, before, pad, device),
                        "attention_mask": mask[:, :before],
                        "position_ids": positions[:, :before],
                    }
                )
                inputs |= {"past_key_values": cache, "use_cache": True}
            self.recording: Recording = stack.record(inputs, z_layer + 1, last)
        device = self.recording.hidden.device  # delta's, which need not be that of the token ids
        self.requests = torch.tensor([r.request for r in rows], device=device)
        entries = [(i, p - r.lookup, y, 1 / len(r.scored)) for i, r in enumerate(rows) for p, y in r.scored]
        self.score_row = torch.tensor([e[0] for e in entries], dtype=torch.long, device=device)
        self.score_position = torch.tensor([e[1] for e in entries], dtype=torch.long, device=device)
        self.labels = torch.tensor([e[2] for e in entries], dtype=torch.long, device=device)
        self.weights = torch.tensor([e[3] for e in entries], device=device)  # 1 / target tokens of the row
        self.kl_reference: Tensor | None = None  # rows x vocabulary, of the first step

    def keep(self, alive: Tensor) -> None:
        """Drop the rows of requests that are done.

        Args:
            alive: (n requests,) bool.
        """
        mask = alive[self.requests]
        rows = mask.nonzero()[:, 0]
        if len(rows) == len(self.requests) or len(rows) == 0:
            self.requests = self.requests[rows]
            return
        self.recording = self.recording.select(rows)
        renumber = torch.cumsum(mask, 0) - 1
        kept = mask[self.score_row]
        self.score_row, self.score_position = renumber[self.score_row[kept]], self.score_position[kept]
        self.labels, self.weights = self.labels[kept], self.weights[kept]
        if self.kl_reference is not None:
            self.kl_reference = self.kl_reference[rows]
        self.requests = self.requests[rows]


class _Loop:
    """The optimisation of one batch; every tensor of the state has one row per request."""

    def __init__(
        self,
        stack: LayerStack,
        hparams: TargetHParams,
        requests: Sequence[EditRequest],
        rows: Sequence[_Row],
        pad: int,
        batch_tokens: int,
    ) -> None:
        self.stack, self.hparams, self.edits = stack, hparams, requests
        self.z_layer, self.loss_layer = max(hparams.layers), hparams.v_loss_layer
        if self.loss_layer < self.z_layer:
            raise SphereError(
                f"v_loss_layer {self.loss_layer} lies below the last edited layer {self.z_layer}: raise it."
            )
        scored = [r for r in rows if r.scored]
        self.prompts_per_request = len(scored) // len(requests)
        self.nll_packs = self._packs(scored, pad, self.loss_layer, batch_tokens)
        essence = [r for r in rows if not r.scored]
        self.kl_packs = self._packs(essence, pad, stack.n_layers - 1, batch_tokens)
        bare = {request: p.recording.hidden[i, 0] for p in self.nll_packs for i, request in p.bare}
        h0 = torch.stack([bare[i] for i in range(len(requests))])  # n x d
        self.h0 = h0.to(torch.promote_types(h0.dtype, torch.float32))
        self.h0_norm = self.h0.norm(dim=1)  # n

    def _packs(self, rows: Sequence[_Row], pad: int, last: int, batch_tokens: int) -> list[_Pack]:
        """Rows sorted by suffix, then prefix length, cut so that a padded group holds at most `batch_tokens`."""
        groups: list[list[_Row]] = []
        before = 0
        for row in sorted(rows, key=lambda r: (len(r.ids) - r.lookup, r.lookup)):
            before = max(before, row.lookup)
            width = before + len(row.ids) - row.lookup
            if groups and (len(groups[-1]) + 1) * width <= batch_tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
                before = row.lookup
        return [_Pack(self.stack, group, pad, self.z_layer, last) for group in groups]

    def optimise(self, progress: bool) -> TargetValues:
        """Adam on delta (n x d); a request that is done keeps the z it had then."""
        n, steps = len(self.edits), self.hparams.v_num_grad_steps
        delta = torch.zeros_like(self.h0).requires_grad_(True)
        adam = torch.optim.Adam([delta], lr=self.hparams.v_lr)
        final = torch.zeros_like(self.h0)
        losses = self.h0.new_zeros(n)
        taken = torch.zeros(n, dtype=torch.long, device=self.h0.device)
        alive = torch.ones(n, dtype=torch.bool, device=self.h0.device)
        bar = tqdm(range(steps), desc="target z", unit="step", leave=False, disable=not progress)
        for step in bar:
            adam.zero_grad(set_to_none=False)
            now = self._losses_with_gradients(delta)
            losses = torch.where(alive, now, losses)
            taken += alive
            finished = alive & (now < LOSS_TOLERANCE) if step < steps - 1 else alive.clone()
            final[finished] = delta.detach()[finished]
            alive = alive & ~finished
            counts = torch.stack([alive.sum(), finished.sum(), (~torch.isfinite(now)).sum()]).tolist()
            if counts[2]:
                self._report_not_finite(now, step)
            if not counts[0]:
                break
            bar.set_postfix(open=counts[0], loss=f"{now[alive].mean().item():.3f}", refresh=False)
            if counts[1]:
                self._drop(alive)
            adam.step()
            self._clamp(delta)
        bar.close()
        log.debug("target z: losses %s, steps %s", losses.tolist(), taken.tolist())
        return TargetValues(self.h0 + final, self.h0, losses, taken)

    def _losses_with_gradients(self, delta: Tensor) -> Tensor:
        """Loss of each request (n,); its gradient is added to delta.grad, one micro-batch after the other."""
        total = self.h0.new_zeros(len(self.edits))
        for pack, essence in [(p, False) for p in self.nll_packs] + [(p, True) for p in self.kl_packs]:
            part = self._kl(pack, delta) if essence else self._nll(pack, delta)
            part.sum().backward()
            total += part.detach()
        decay = self.hparams.v_weight_decay * delta.norm(dim=1) / self.h0_norm**2
        decay.sum().backward()
        return total + decay.detach()

    def _edited(self, pack: _Pack, delta: Tensor, last: int) -> Tensor:
        """Suffix hidden states (rows x positions x d) leaving layer `last`, with delta at the lookup position."""
        hidden = pack.recording.hidden
        at_lookup = hidden[:, 0].to(delta.dtype) + delta[pack.requests]  # rows x d
        hidden = torch.cat([at_lookup.to(hidden.dtype)[:, None], hidden[:, 1:]], dim=1)
        return self.stack.run(pack.recording, hidden, self.z_layer + 1, last)

    def _nll(self, pack: _Pack, delta: Tensor) -> Tensor:
        """Mean over prompts of the mean negative log-likelihood of the target's tokens: (n,)."""
        hidden = self._edited(pack, delta, self.loss_layer)
        row, position = pack.score_row.to(hidden.device), pack.score_position.to(hidden.device)
        logits = self.stack.logits(hidden[row, position])  # scored x vocabulary
        nll = F.cross_entropy(logits, pack.labels.to(logits.device), reduction="none").to(delta)
        share = nll * pack.weights.to(delta) / self.prompts_per_request
        return delta.new_zeros(len(self.edits)).index_add(0, pack.requests[pack.score_row], share)

    def _kl(self, pack: _Pack, delta: Tensor) -> Tensor:
        """kl_factor * KL(now || first step) of the next token after "{subject} is a"'s lookup position: (n,)."""
        hidden = self._edited(pack, delta, self.stack.n_layers - 1)
        now = F.log_softmax(self.stack.logits(hidden[:, 0]), dim=-1)  # rows x vocabulary
        if pack.kl_reference is None:
            pack.kl_reference = now.detach()
        kl = F.kl_div(pack.kl_reference, now, log_target=True, reduction="none").sum(dim=1).to(delta)
        return delta.new_zeros(len(self.edits)).index_add(0, pack.requests, self.hparams.kl_factor * kl)

    @torch.no_grad()
    def _clamp(self, delta: Tensor) -> None:
        """||delta|| <= clamp_norm_factor * ||h0||, request by request."""
        limit = self.hparams.clamp_norm_factor * self.h0_norm
        delta.mul_((limit / delta.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None])

    def _drop(self, alive: Tensor) -> None:
        for pack in self.nll_packs + self.kl_packs:
            pack.keep(alive)
        self.nll_packs = [p for p in self.nll_packs if len(p.requests)]
        self.kl_packs = [p for p in self.kl_packs if len(p.requests)]

    def _report_not_finite(self, losses: Tensor, step: int) -> None:
        cases = [self.edits[i].case_id for i in (~torch.isfinite(losses)).nonzero()[:, 0].tolist()]
        raise SphereError(
            f"The loss of target z at layer {self.z_layer} is not finite at step {step + 1} for case(s) {cases}: the "
            "weights may be broken (see the batches before), or try a smaller v_lr or --dtype float32."
        )
