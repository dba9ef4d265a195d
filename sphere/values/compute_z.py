"""Target values z: what the last edited layer should put out at the subject's last token (ROME, eq. 4; MEMIT, eq. 14).

All requests of a batch are optimised together, and nothing is computed that cannot change the result:
positions before the lookup token are constant, so their attention keys and values are kept from one first pass, and
what the rows of a context template share is run once; layers up to z see no change, so the loop starts above them;
the top layer's MLP and the logits are computed only where they are scored; rows are laid end to end, so that few and
full matrices are multiplied; requests whose loss is small enough leave the loop with all their rows; the last step,
which takes no update, needs no gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.device_memory import gradient_tokens
from sphere.forward.layers import LayerStack, RecordedCalls, inference
from sphere.forward.matmul_dtype import multiply_in, shared_heads
from sphere.forward.padding import lines, packs
from sphere.forward.prefixes import Places, PrefixStore, Segment
from sphere.forward.stop_check import StopCheck
from sphere.hparams import TargetHParams
from sphere.requests import EditRequest
from sphere.values.context_templates import BARE, fill, padding_id
from sphere.values.tokenization import encode, encode_pair, subject_token

log = logging.getLogger(__name__)

LOSS_TOLERANCE = 5e-2
ESSENCE = "{} is a"
REPACKED = 0.8  # share of the computed tokens that is open, at which what is done is left out


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
    """One sequence: its tokens, the lookup position and what is measured.

    Attributes:
        request: index of its request in the batch.
        template: rows of one template begin alike.
        scored: (position, label) of the target's tokens.
        essence: whether the next-token distribution at the lookup position enters the KL term.
        bare: the prompt alone, without a context before it: gives h0.
    """

    request: int
    template: str
    ids: list[int]
    lookup: int
    scored: tuple[tuple[int, int], ...] = ()
    essence: bool = False
    bare: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from other rows."""
        return self.request, self.template

    @property
    def prefix(self) -> list[int]:
        """The constant tokens."""
        return self.ids[: self.lookup]

    @property
    def suffix(self) -> list[int]:
        """The tokens that see delta: from the lookup token on."""
        return self.ids[self.lookup :]


def compute_z(
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[Sequence[str]],
    hparams: TargetHParams,
    *,
    batch_tokens: int | None = None,
    products: torch.dtype | None = None,
    progress: bool = True,
) -> TargetValues:
    """Optimise delta at the output of the last edited layer for all requests at once.

    Args:
        templates: groups of context templates with one `{}`, the bare "{}" among them.
        batch_tokens: how many (padded) tokens one micro-batch may compute; by default what there is room for.
        products: type in which the layers above z multiply while z is sought; None: the model's own.

    Returns:
        z (n x d) and what the optimisation did.

    Raises:
        SphereError: a subject that is not in its prompt, or a loss that is not finite (the case is named).
    """
    flat = [template for group in templates for template in group]
    if BARE not in flat:
        raise SphereError(
            f"The context templates {flat} lack the bare '{BARE}', at which h0 is read: add it."
        )
    top = hparams.v_loss_layer == stack.n_layers - 1
    rows = [
        row
        for index, request in enumerate(requests)
        for row in _rows(tokenizer, index, request, flat, kl=hparams.kl_factor != 0, merge=top)
    ]
    above = stack.layers[max(hparams.layers) + 1 : hparams.v_loss_layer + 1]
    batch_tokens = batch_tokens or gradient_tokens(above, stack.lm_head)
    with inference(stack.model), shared_heads(stack.device):
        loop = _Loop(stack, hparams, requests, rows, padding_id(tokenizer), batch_tokens)
        with multiply_in(products, above):
            return loop.optimise(progress)


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    request: EditRequest,
    templates: Sequence[str],
    *,
    kl: bool,
    merge: bool,
) -> list[_Row]:
    """A request in every template with its target behind it, and "{subject} is a" up to its lookup token.

    Args:
        kl: whether the KL term counts.
        merge: whether a bare prompt that begins with the subject may stand in for "{subject} is a".
    """
    what, rows = f"case {request.case_id}", []
    essence = encode(tokenizer, ESSENCE.format(request.subject))
    seen = essence.ids[: subject_token(tokenizer, essence, len(request.subject), what) + 1]
    for template in templates:
        filled = fill(template, request)
        ids, start = encode_pair(tokenizer, filled.text, request.target_new)
        lookup = subject_token(tokenizer, encode(tokenizer, filled.text), filled.subject_end, what)
        if lookup >= start:
            raise SphereError(
                f"The subject of {what} shares its last token with the target: check the prompt."
            )
        scored = tuple((position - 1, ids[position]) for position in range(start, len(ids)))
        stands_in = kl and merge and ids[: lookup + 1] == seen
        kl = kl and not stands_in
        rows.append(_Row(index, template, ids[:-1], lookup, scored, stands_in, template == BARE))
    if kl:
        rows.append(_Row(index, ESSENCE, seen, len(seen) - 1, essence=True))
    return rows


class _Pack:
    """Lines computed together: the hidden states of their suffixes entering the loop, and where they are measured.

    The rows of a line follow each other without seeing each other.
    """

    def __init__(
        self,
        stack: LayerStack,
        store: PrefixStore,
        lines: list[list[_Row]],
        places: dict[tuple[int, str], Places],
        first: int,
        last: int,
    ) -> None:
        self.last = last
        segments = [[Segment(places[row.key], row.suffix) for row in line] for line in lines]
        with torch.no_grad():
            self.recording: RecordedCalls = stack.record(store.inputs(segments), first, last)
        self.kl_reference: Tensor | None = None  # essence rows x vocabulary, of the first step
        device = self.recording.hidden.device  # delta's, which need not be that of the token ids
        self.rows = [row for line in lines for row in line]
        at = []  # where each row's lookup token is
        for number, line in enumerate(lines):
            ends = accumulate(len(row.suffix) for row in line)
            at += [(number, end - len(row.suffix)) for row, end in zip(line, ends, strict=True)]
        scored = [
            ((line, column + position - row.lookup), label, row)
            for (line, column), row in zip(at, self.rows, strict=True)
            for position, label in row.scored
        ]
        essence = [(place, row) for place, row in zip(at, self.rows, strict=True) if row.essence]
        measured = [place for place, *_ in scored] + [place for place, _ in essence]
        points = {place: n for n, place in enumerate(dict.fromkeys(measured))}

        def tensor(values: Iterable[float], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        self.requests = tensor(row.request for row in self.rows)
        self.line, self.column = tensor(line for line, _ in at), tensor(column for _, column in at)
        self.point_line, self.point_column = tensor(i for i, _ in points), tensor(j for _, j in points)
        self.score_point = tensor(points[place] for place, *_ in scored)
        self.labels = tensor(label for _, label, _ in scored)
        self.shares = tensor((1 / len(row.scored) for *_, row in scored), torch.float32)
        self.score_request = tensor(row.request for *_, row in scored)
        self.kl_point = tensor(points[place] for place, _ in essence)
        self.kl_request = tensor(row.request for _, row in essence)

    def at_lookups(self) -> Tensor:
        """What enters the loop at each row's lookup token: (rows x d)."""
        return self.recording.hidden[self.line, self.column]


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
        self.z_layer = max(hparams.layers)
        if hparams.v_loss_layer < self.z_layer:
            raise SphereError(
                f"v_loss_layer {hparams.v_loss_layer} lies below the last edited layer {self.z_layer}: raise it."
            )
        self.prompts_per_request = sum(bool(row.scored) for row in rows) // len(requests)
        self.store = PrefixStore(stack, pad, batch_tokens)
        places = self.store.add([row.prefix for row in rows], [row.template for row in rows])
        self.places = {row.key: place for row, place in zip(rows, places, strict=True)}
        self.together = stack.takes_trees(max((row.ids for row in rows), key=len))
        self.packs = self._pack(rows)
        bare = {
            row.request: hidden
            for pack in self.packs
            for row, hidden in zip(pack.rows, pack.at_lookups(), strict=True)
            if row.bare
        }
        h0 = torch.stack([bare[i] for i in range(len(requests))])  # n x d
        self.h0 = h0.to(torch.promote_types(h0.dtype, torch.float32))
        self.h0_norm = self.h0.norm(dim=1)  # n

    def _pack(self, rows: Sequence[_Row]) -> list[_Pack]:
        """Micro-batches of lines that end at the same layer; a row has a line of its own where models ask for it."""
        top, budget, result = self.stack.n_layers - 1, self.store.batch_tokens, []
        last = [top if row.essence else self.hparams.v_loss_layer for row in rows]
        for layer in sorted(set(last)):
            chosen = [row for row, its in zip(rows, last, strict=True) if its == layer]
            lengths = [len(row.suffix) for row in chosen]
            if self.together:
                groups = lines(lengths, budget)
            else:
                groups = [[[i] for i in group] for group in packs(lengths, budget, self.stack.pass_overhead)]
            for group in groups:
                own = [[chosen[i] for i in line] for line in group]
                result.append(_Pack(self.stack, self.store, own, self.places, self.z_layer + 1, layer))
        return result

    def optimise(self, progress: bool) -> TargetValues:
        """Adam on delta (n x d); a request that is done keeps the z it had then."""
        n, steps = len(self.edits), self.hparams.v_num_grad_steps
        delta = torch.zeros_like(self.h0).requires_grad_(True)
        adam = torch.optim.Adam([delta], lr=self.hparams.v_lr)
        final = torch.zeros_like(self.h0)
        losses = self.h0.new_zeros(n)
        taken = torch.zeros(n, dtype=torch.long, device=self.h0.device)
        alive = torch.ones(n, dtype=torch.bool, device=self.h0.device)
        watch = StopCheck(self.h0.device)
        bar = tqdm(range(steps), desc="target z", unit="step", leave=False, disable=not progress)
        for step in bar:
            last = step == steps - 1
            adam.zero_grad(set_to_none=False)
            now = self._losses(delta, gradient=not last)
            losses = torch.where(alive, now, losses)
            taken += alive
            finished = alive if last else alive & (now < LOSS_TOLERANCE)
            final = torch.where(finished[:, None], delta.detach(), final)
            alive = alive & ~finished
            if last:
                break
            adam.step()
            self._clamp(delta)
            seen = watch.read(alive, losses)
            if seen is None:
                continue
            is_open, mean_loss = seen
            if not any(is_open) or not math.isfinite(mean_loss):
                break
            bar.set_postfix(open=sum(is_open), loss=f"{mean_loss:.3f}", refresh=False)
            self._drop(is_open)
        bar.close()
        if not torch.isfinite(losses).all():
            self._report_not_finite(losses, taken)
        log.debug("target z: losses %s, steps %s", losses.tolist(), taken.tolist())
        return TargetValues(self.h0 + final, self.h0, losses, taken)

    def _losses(self, delta: Tensor, gradient: bool) -> Tensor:
        """Loss of each request (n,); its gradient is added to delta.grad, one micro-batch after the other."""
        total = torch.zeros_like(self.h0_norm)
        with torch.set_grad_enabled(gradient):
            # One graph at a time: a list of all parts would hold those of all micro-batches.
            for part in chain((self._pack_losses(pack, delta) for pack in self.packs), [self._decay(delta)]):
                if gradient:
                    part.sum().backward()
                total += part.detach()
        return total

    def _pack_losses(self, pack: _Pack, delta: Tensor) -> Tensor:
        """What a pack adds to each request's loss (n,).

        The mean over prompts of the mean negative log-likelihood of the target's tokens, and
        kl_factor * KL(now || first step) of the next token after "{subject} is a"'s lookup position.
        """
        hidden = pack.recording.hidden  # lines x positions x d
        at_lookup = pack.at_lookups().to(delta.dtype) + delta[pack.requests]  # rows x d
        hidden = hidden.index_put((pack.line, pack.column), at_lookup.to(hidden.dtype))
        points = self.stack.run_at(
            pack.recording, hidden, self.z_layer + 1, pack.last, pack.point_line, pack.point_column
        )
        logits = self.stack.logits(points)  # points x vocabulary
        scored, labels = pack.score_point.to(logits.device), pack.labels.to(logits.device)
        nll = F.cross_entropy(logits[scored], labels, reduction="none").to(delta)
        total = torch.zeros_like(self.h0_norm)
        total = total.index_add(0, pack.score_request, nll * pack.shares.to(delta) / self.prompts_per_request)
        if len(pack.kl_point):
            now = F.log_softmax(logits[pack.kl_point.to(logits.device)], dim=-1)  # essence rows x vocabulary
            if pack.kl_reference is None:
                pack.kl_reference = now.detach()
            kl = F.kl_div(pack.kl_reference, now, log_target=True, reduction="none").sum(dim=1).to(delta)
            total = total.index_add(0, pack.kl_request, self.hparams.kl_factor * kl)
        return total

    def _decay(self, delta: Tensor) -> Tensor:
        """v_weight_decay * ||delta|| / ||h0||^2, (n,)."""
        return self.hparams.v_weight_decay * delta.norm(dim=1) / self.h0_norm**2

    @torch.no_grad()
    def _clamp(self, delta: Tensor) -> None:
        """||delta|| <= clamp_norm_factor * ||h0||, request by request."""
        limit = self.hparams.clamp_norm_factor * self.h0_norm
        delta.mul_((limit / delta.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None])

    def _drop(self, is_open: Sequence[bool]) -> None:
        """Lay out anew what is open, once that is enough less than what is computed."""
        rows = [row for pack in self.packs for row in pack.rows]
        left = [row for row in rows if is_open[row.request]]
        if sum(len(row.suffix) for row in left) > REPACKED * sum(len(row.suffix) for row in rows):
            return
        references = {
            request: reference
            for pack in self.packs
            if pack.kl_reference is not None
            for request, reference in zip(pack.kl_request.tolist(), pack.kl_reference, strict=True)
        }
        self.packs = self._pack(left)
        for pack in self.packs:
            if len(pack.kl_request):
                pack.kl_reference = torch.stack([references[i] for i in pack.kl_request.tolist()])

    def _report_not_finite(self, losses: Tensor, taken: Tensor) -> None:
        broken = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        step, cases = max(taken[broken].tolist()), [self.edits[i].case_id for i in broken]
        raise SphereError(
            f"The loss of target z at layer {self.z_layer} is not finite at step {step} for case(s) {cases}: the "
            "weights may be broken (see the batches before), or try a smaller v_lr or --dtype float32."
        )
