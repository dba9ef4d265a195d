"""Target values z: what the last edited layer should put out at the subject's last token (ROME, eq. 4; MEMIT, eq. 14).

All requests of a batch are optimised together, and nothing is computed that cannot change the result:
positions before the lookup token are constant, so their attention keys and values are kept from one first pass, and
what the prompts of a context template share is run once; layers up to z see no change, so the loop starts above them;
the top layer's MLP and the logits are computed only where they are scored; prompts are laid end to end in packed rows,
so that few and full matrices are multiplied; requests whose loss is small enough, or whose target is likely enough
(`sphere.values.z_stop`), leave the loop with all their prompts;
the last step, which takes no update, needs no gradient.

Where a norm stands between the edited modules and the residual stream they can add only so much, however large their
output: a z that asks for more would promise a probability that no update gives. There the variables are not delta but
changes of the modules' outputs, of which delta is what the layers make (`sphere.values.module_residual.Reach`), so that
every z is within reach. Elsewhere every delta is, and is the variable itself.

How prompts, prefixes and positions lie: a prompt is a request in one context template with its target behind it, or the
KL prompt "{subject} is a", cut after the subject. At its lookup token, the subject's last, delta is added:

                     prefix                 suffix
    prompt    The sun is up . Ann | Lee is Wel        labels:   is -> Wel, Wel -> sh
              run once, in the      ^lookup
              slots of a PrefixStore

    columns   0      1      2      3      4      5      6      7
    row 0     Lee    is     Wel    Bo     plays  the    .      .       2 suffixes end to end, then padding
    row 1     Oz     ,      a      coun   try    ,      is     Ro      each sees its prefix's slots and itself

A micro-batch is some such rows (rows x columns x d), computed together. `lookup_row`, `lookup_column` say where each
prompt's lookup token is ((0, 0), (0, 3), (1, 0)), `point_row`, `point_column` where logits are computed: wherever the
next token is a target's ((0, 1), (0, 2), (0, 5), (1, 6), (1, 7)), and at the lookup tokens of KL prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.device_memory import gradient_tokens
from sphere.forward.layers import LayerStack
from sphere.forward.matmul_dtype import multiply_in, shared_heads
from sphere.forward.modules import inference
from sphere.forward.padding import group_by_length, pack_rows
from sphere.forward.prefixes import PrefixStore
from sphere.forward.remaining import adds_as_is
from sphere.forward.stop_check import StopCheck
from sphere.hparams import TargetHParams
from sphere.requests import EditRequest
from sphere.values.compute_ks import ActivationsPass
from sphere.values.context_templates import BARE
from sphere.values.module_residual import Reach
from sphere.values.tokenization import encode, padding_id
from sphere.values.z_batches import MicroBatch, Prompt, prompts_of
from sphere.values.z_stop import EarlyStop

log = logging.getLogger(__name__)

LOSS_TOLERANCE = 5e-2
REPACKED = 0.8  # fraction of the computed tokens that is open, at which what is done is left out


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


def compute_z(
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[Sequence[str]],
    hparams: TargetHParams,
    *,
    batch_tokens: int | None = None,
    matmul_dtype: torch.dtype | None = None,
    bare: str = BARE,
    progress: bool = True,
) -> TargetValues:
    """Optimise delta at the output of the last edited layer for all requests at once.

    Args:
        templates: groups of context templates with one `{}`, the bare one among them.
        batch_tokens: how many (padded) tokens one micro-batch may compute; by default what there is room for.
        matmul_dtype: in which the layers above z multiply while z is sought; None: the model's own.
        bare: the template without a context: "{}", or the user's turn of a chat template.

    Returns:
        z (n x d) and what the optimisation did.

    Raises:
        SphereError: a subject that is not in its prompt, or a loss that is not finite (the case is named).
    """
    flat = [template for group in templates for template in group]
    if bare not in flat:
        raise SphereError(
            f"The context templates {flat} lack the bare '{bare}', at which h0 is read: add it."
        )
    top = hparams.v_loss_layer == stack.n_layers - 1
    prompts = [
        prompt
        for index, request in enumerate(requests)
        for prompt in prompts_of(
            tokenizer, index, request, flat, kl=hparams.kl_factor != 0, merge=top, bare=bare
        )
    ]
    budget = gradient_pass_tokens(stack, hparams, batch_tokens)
    with inference(stack.model), shared_heads(stack.device):
        loop = _Loop(stack, hparams, requests, prompts, padding_id(tokenizer), budget)
        loop.reach = _reach(stack, tokenizer, requests, bare, budget)
        with multiply_in(matmul_dtype, _layers_above(stack, hparams)):
            return loop.optimise(progress)


def gradient_pass_tokens(stack: LayerStack, hparams: TargetHParams, batch_tokens: int | None) -> int:
    """How many tokens a micro-batch computes: those asked for, or what there is room for right now."""
    return batch_tokens or gradient_tokens(_layers_above(stack, hparams), stack.lm_head)


def _reach(
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    bare: str,
    budget: int,
) -> Reach | None:
    """What bounds delta; None where the edited layers can give any."""
    if adds_as_is(stack, encode(tokenizer, requests[0].text).ids):
        return None
    return Reach(ActivationsPass(stack, tokenizer, requests, ((bare,),), budget, bare))


def _layers_above(stack: LayerStack, hparams: TargetHParams) -> list[nn.Module]:
    """The layers that the loop runs."""
    return stack.layers[max(hparams.layers) + 1 : hparams.v_loss_layer + 1]


class _Loop:
    """The optimisation of one batch; every tensor of the state has one row per request."""

    def __init__(
        self,
        stack: LayerStack,
        hparams: TargetHParams,
        requests: Sequence[EditRequest],
        prompts: Sequence[Prompt],
        pad: int,
        batch_tokens: int,
    ) -> None:
        self.stack, self.hparams, self.edits = stack, hparams, requests
        self.z_layer = max(hparams.layers)
        if hparams.v_loss_layer < self.z_layer:
            raise SphereError(
                f"v_loss_layer {hparams.v_loss_layer} lies below the last edited layer {self.z_layer}: raise it."
            )
        self.prompts_per_request = sum(bool(prompt.scored) for prompt in prompts) // len(requests)
        self.store = PrefixStore(stack, pad, batch_tokens)
        slots = self.store.add([prompt.prefix for prompt in prompts], [prompt.template for prompt in prompts])
        self.slots = {prompt.key: own for prompt, own in zip(prompts, slots, strict=True)}
        self.packed = stack.takes_trees(max((prompt.ids for prompt in prompts), key=len))
        self.micro_batches = self._lay_out(prompts)
        bare = {
            prompt.request: hidden
            for batch in self.micro_batches
            for prompt, hidden in zip(batch.prompts, batch.at_lookups(), strict=True)
            if prompt.bare
        }
        h0 = torch.stack([bare[i] for i in range(len(requests))])  # n x d
        self.h0 = h0.to(torch.promote_types(h0.dtype, torch.float32))
        self.h0_norm = self.h0.norm(dim=1)  # n
        self.reach: Reach | None = None
        self.stop = EarlyStop(hparams, len(requests), self.prompts_per_request, self.h0.device)

    def _lay_out(self, prompts: Sequence[Prompt]) -> list[MicroBatch]:
        """Micro-batches that end at the same layer; a prompt has a row of its own where the model asks for it."""
        top, budget, result = self.stack.n_layers - 1, self.store.batch_tokens, []
        last = [top if prompt.kl else self.hparams.v_loss_layer for prompt in prompts]
        for layer in sorted(set(last)):
            chosen = [prompt for prompt, its in zip(prompts, last, strict=True) if its == layer]
            lengths = [len(prompt.suffix) for prompt in chosen]
            if self.packed:
                groups = pack_rows(lengths, budget)
            else:
                groups = [
                    [[i] for i in group]
                    for group in group_by_length(lengths, budget, self.stack.pass_overhead)
                ]
            for group in groups:
                rows = [[chosen[i] for i in row] for row in group]
                result.append(MicroBatch(self.stack, self.store, rows, self.slots, self.z_layer + 1, layer))
        return result

    def optimise(self, progress: bool) -> TargetValues:
        """Adam on delta (n x d); a request that is done keeps the z it had then."""
        n, steps = len(self.edits), self.hparams.v_num_grad_steps
        delta = torch.zeros_like(self.h0).requires_grad_(True)
        variables = [delta] if self.reach is None else [self.reach.group(self.hparams.v_lr)]
        adam = torch.optim.Adam(variables, lr=self.hparams.v_lr)
        final = torch.zeros_like(self.h0)
        losses = self.h0.new_zeros(n)
        n_steps = torch.zeros(n, dtype=torch.long, device=self.h0.device)
        alive = torch.ones(n, dtype=torch.bool, device=self.h0.device)
        stop_check = StopCheck(self.h0.device)
        bar = tqdm(range(steps), desc="target z", unit="step", leave=False, disable=not progress)
        for step in bar:
            last = step == steps - 1
            adam.zero_grad(set_to_none=False)
            now = self._losses(delta, gradient=not last)
            losses = torch.where(alive, now, losses)
            n_steps += alive
            finished = alive if last else alive & ((now < LOSS_TOLERANCE) | self.stop.reached())
            final = torch.where(finished[:, None], delta.detach(), final)
            alive = alive & ~finished
            if last:
                break
            self._step(adam, delta)
            self._clamp(delta)
            known = stop_check.read(alive, losses)
            if known is None:
                continue
            is_open, mean_loss = known
            if not any(is_open) or not math.isfinite(mean_loss):
                break
            bar.set_postfix(open=sum(is_open), loss=f"{mean_loss:.3f}", refresh=False)
            self._drop(is_open)
        bar.close()
        if not torch.isfinite(losses).all():
            self._report_not_finite(losses, n_steps)
        log.debug("target z: losses %s, steps %s", losses.tolist(), n_steps.tolist())
        return TargetValues(self.h0 + final, self.h0, losses, n_steps)

    def _step(self, adam: torch.optim.Adam, delta: Tensor) -> None:
        """One step of delta (n x d), or of the changes of the modules' outputs that make it."""
        if self.reach is not None:
            assert delta.grad is not None
            self.reach.pull_back(delta.grad)
            delta.grad = None
        adam.step()
        if self.reach is not None:
            delta.data.copy_(self.reach.delta())

    def _losses(self, delta: Tensor, gradient: bool) -> Tensor:
        """Loss of each request (n,); its gradient is added to delta.grad, one micro-batch after the other."""
        total = torch.zeros_like(self.h0_norm)
        self.stop.start()
        with torch.set_grad_enabled(gradient):
            # One graph at a time: a list of all parts would hold those of all micro-batches.
            parts = (self._micro_batch_losses(batch, delta) for batch in self.micro_batches)
            for part in chain(parts, [self._decay(delta)]):
                if gradient:
                    part.sum().backward()
                total += part.detach()
        return total

    def _micro_batch_losses(self, batch: MicroBatch, delta: Tensor) -> Tensor:
        """What a micro-batch adds to each request's loss (n,).

        The mean over prompts of the mean negative log-likelihood of the target's tokens, and
        kl_factor * KL(now || first step) of the next token at the KL prompt's lookup position.
        """
        hidden = batch.recorded.hidden  # rows x columns x d
        at_lookup = batch.at_lookups().to(delta.dtype) + delta[batch.requests]  # prompts x d
        hidden = hidden.index_put((batch.lookup_row, batch.lookup_column), at_lookup.to(hidden.dtype))
        at_points = self.stack.run_at(
            batch.recorded, hidden, self.z_layer + 1, batch.last, batch.point_row, batch.point_column
        )  # points x d
        logits = self.stack.logits(at_points)  # points x vocabulary
        scored, labels = batch.score_point.to(logits.device), batch.labels.to(logits.device)
        at_targets = logits[scored]  # scored tokens x vocabulary
        nll = F.cross_entropy(at_targets, labels, reduction="none").to(delta)  # scored tokens
        weighted = nll * batch.score_weight.to(delta) / self.prompts_per_request
        self.stop.note(at_targets, labels, batch.score_request, batch.score_weight)
        total = torch.zeros_like(self.h0_norm).index_add(0, batch.score_request, weighted)
        if len(batch.kl_point):
            now = F.log_softmax(logits[batch.kl_point.to(logits.device)], dim=-1)  # KL prompts x vocabulary
            if batch.kl_reference is None:
                batch.kl_reference = now.detach()
            kl = F.kl_div(batch.kl_reference, now, log_target=True, reduction="none").sum(dim=1).to(delta)
            total = total.index_add(0, batch.kl_request, self.hparams.kl_factor * kl)
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
        prompts = [prompt for batch in self.micro_batches for prompt in batch.prompts]
        left = [prompt for prompt in prompts if is_open[prompt.request]]
        if sum(len(p.suffix) for p in left) > REPACKED * sum(len(p.suffix) for p in prompts):
            return
        references = {
            request: reference
            for batch in self.micro_batches
            if batch.kl_reference is not None
            for request, reference in zip(batch.kl_request.tolist(), batch.kl_reference, strict=True)
        }
        self.micro_batches = self._lay_out(left)
        for batch in self.micro_batches:
            if len(batch.kl_request):
                batch.kl_reference = torch.stack([references[i] for i in batch.kl_request.tolist()])

    def _report_not_finite(self, losses: Tensor, n_steps: Tensor) -> None:
        broken = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        step, cases = max(n_steps[broken].tolist()), [self.edits[i].case_id for i in broken]
        raise SphereError(
            f"The loss of target z at layer {self.z_layer} is not finite at step {step} for case(s) {cases}: the "
            "weights may be broken (see the batches before), or try a smaller v_lr or the dtype float32."
        )
