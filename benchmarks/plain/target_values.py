"""Target values z the plain way: one request at a time, the whole model at every step, logits at all positions.

The same mathematics as `sphere.values.compute_z` (ROME, eq. 4; MEMIT, eq. 14), laid out as in the published code of
MEMIT and AlphaEdit: the prompts of a request, right-padded, go through the full model with a hook that adds delta at
the lookup positions. All logits are the model's own: those of the KL with all of its layers, those of the target's
likelihood with the layers above `v_loss_layer` left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.plain.tokens import to_subject, with_target
from sphere.hparams import TargetHParams
from sphere.requests import EditRequest
from sphere.values.compute_z import LOSS_TOLERANCE, TargetValues

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class Prompts:
    """The right-padded rows of one request: P prompts with the target, and "{subject} is a" as the last row.

    Attributes:
        ids: (P + 1 x length).
        mask: (P + 1 x length), 1 at tokens.
        labels: (P x length), the target's tokens at the positions that predict them, -100 elsewhere.
        lookups: (P + 1,) position of the subject's last token.
        bare: row of the prompt without a context.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    lookups: Tensor
    bare: int


def prompts_of(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Sequence[Sequence[str]],
    device: torch.device,
) -> Prompts:
    """Tokenise a request in every context template."""
    flat = [template for group in templates for template in group]
    rows, lookups, starts = [], [], []
    for template in flat:
        text, up_to_subject = to_subject(tokenizer, template, request)
        ids, start = with_target(tokenizer, text, request.target_new)
        rows.append(ids)
        starts.append(start)
        lookups.append(len(up_to_subject) - 1)
    _, up_to_subject = to_subject(tokenizer, KL_PROMPT, dataclasses.replace(request, prompt="{}"))
    lookups.append(len(up_to_subject) - 1)
    fed = [row[:-1] for row in rows] + [up_to_subject]
    length = max(map(len, fed))
    ids = torch.zeros(len(fed), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(fed):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        labels[i, start - 1 : len(row) - 1] = torch.tensor(row[start:])
    tensors = [t.to(device) for t in (ids, mask, labels, torch.tensor(lookups))]
    return Prompts(*tensors, bare=flat.index("{}"))


def plain_target_values(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[Sequence[str]],
    hparams: TargetHParams,
) -> TargetValues:
    """z (n x d) and what the optimisation did, request by request."""
    device = model.get_input_embeddings().weight.device
    found = [_one(model, prompts_of(tokenizer, request, templates, device), hparams) for request in requests]
    delta, h0, losses, steps = (torch.stack(parts) for parts in zip(*found, strict=True))
    return TargetValues(h0 + delta, h0, losses, steps)


def _one(model: nn.Module, prompts: Prompts, hparams: TargetHParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta (d,), h0 (d,), the last loss and the number of steps of one request."""
    size = model.get_submodule(hparams.lm_head_module).weight.shape[1]
    dtype = torch.promote_types(model.dtype, torch.float32)
    delta = torch.zeros(size, dtype=dtype, device=prompts.ids.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr)
    h0, reference = torch.empty(0), torch.empty(0)
    likeliest = 0  # steps in a row at which all of the target's tokens are
    for step in range(hparams.v_num_grad_steps):
        adam.zero_grad()
        target_log_probs, next_token, unmodified = _forward(model, prompts, hparams, delta)
        if step == 0:
            h0, reference = unmodified.to(dtype), next_token.detach()
        scored = prompts.labels != -100  # P x length
        labels = prompts.labels.clamp(min=0)[..., None]
        log_probs = target_log_probs.gather(2, labels)[..., 0] * scored  # P x length
        nll = -(log_probs.sum(1) / scored.sum(1)).mean()
        kl = (next_token.exp() * (next_token - reference)).sum()  # KL(now || first step)
        loss = nll + hparams.kl_factor * kl + hparams.v_weight_decay * delta.norm() / h0.norm() ** 2
        all_likeliest = bool((target_log_probs.argmax(2) == prompts.labels)[scored].all())
        likeliest = likeliest + 1 if all_likeliest else 0
        if hparams.z_stop is not None and likeliest > hparams.z_stop:
            break
        probability = ((log_probs.exp() * scored).sum(1) / scored.sum(1)).mean()
        if hparams.z_stop_probability is not None and probability > hparams.z_stop_probability:
            break
        if loss < LOSS_TOLERANCE or step == hparams.v_num_grad_steps - 1:
            break
        loss.backward()
        adam.step()
        limit = hparams.clamp_norm_factor * h0.norm()
        if delta.norm() > limit:
            with torch.no_grad():
                delta.mul_(limit / delta.norm())
    return delta.detach(), h0, loss.detach(), torch.tensor(step + 1, device=h0.device)


def _forward(
    model: nn.Module, prompts: Prompts, hparams: TargetHParams, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole model with delta (d,) added to layer z's output at the lookup positions.

    Returns:
        log-probabilities at `v_loss_layer`, (P x length x vocabulary);
        next-token log-probabilities at the lookup position of "{subject} is a", (vocabulary,);
        layer z's own output at the bare prompt's lookup position, (d,).
    """
    rows = torch.arange(len(prompts.ids), device=prompts.ids.device)
    captured: dict[str, Tensor] = {}

    def add_delta(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]  # P + 1 x length x d
        captured["h0"] = hidden[prompts.bare, prompts.lookups[prompts.bare]].detach().clone()
        at_lookup = hidden[rows, prompts.lookups].to(delta.dtype) + delta
        changed = hidden.index_put((rows, prompts.lookups), at_lookup.to(hidden.dtype))
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def log_probs() -> Tensor:
        logits = model(input_ids=prompts.ids, attention_mask=prompts.mask, use_cache=False).logits
        return logits.float().log_softmax(-1)  # P + 1 x length x vocabulary

    z_layer = model.get_submodule(hparams.layer_module_tmp.format(max(hparams.layers)))
    handle = z_layer.register_forward_hook(add_delta)
    try:
        all_layers = at_loss_layer = log_probs()
        with _left_out(_layers_above(model, hparams)) as left_out:
            if left_out:
                at_loss_layer = log_probs()
    finally:
        handle.remove()
    return at_loss_layer[:-1], all_layers[-1, prompts.lookups[-1]], captured["h0"]


def _layers_above(model: nn.Module, hparams: TargetHParams) -> list[nn.Module]:
    """The layers above `v_loss_layer`."""
    layers = model.get_submodule(hparams.layer_module_tmp.partition(".{}")[0])
    return list(layers)[hparams.v_loss_layer + 1 :]  # type: ignore[call-overload]


@contextmanager
def _left_out(layers: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Within the block layers put out the hidden states that enter them."""

    def pass_on(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return entering if isinstance(output, Tensor) else (entering, *output[1:])

    handles = [layer.register_forward_hook(pass_on, with_kwargs=True) for layer in layers]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
