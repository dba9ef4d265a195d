"""What the optimisation of z runs: prompts cut at their lookup token, laid out in packed rows and micro-batches.

The picture is in `sphere.values.compute_z`. Knows how prompts become index tensors; knows nothing of losses or steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.layers import LayerStack, RecordedCalls
from sphere.forward.prefixes import PrefixStore, Segment, Slots
from sphere.requests import EditRequest
from sphere.values.context_templates import BARE, fill
from sphere.values.joiner import Continued
from sphere.values.tokenization import bos_text, encode, encode_pair, subject_token

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class Prompt:
    """One sequence that is run: its tokens, the lookup position and what is measured.

    Attributes:
        request: index of its request in the batch.
        template: prompts of one template begin alike.
        ids: token ids; the target's last one is a label only and not among them.
        lookup: position of the subject's last token, where delta is added.
        scored: (position, label): the next token after `position` should be `label`, for each of the target's tokens.
        kl: whether the next-token distribution at the lookup position enters the KL term.
        bare: without a context before it: gives h0.
    """

    request: int
    template: str
    ids: list[int]
    lookup: int
    scored: tuple[tuple[int, int], ...] = ()
    kl: bool = False
    bare: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from other prompts of the batch."""
        return self.request, self.template

    @property
    def prefix(self) -> list[int]:
        """The constant tokens."""
        return self.ids[: self.lookup]

    @property
    def suffix(self) -> list[int]:
        """The tokens that see delta: from the lookup token on."""
        return self.ids[self.lookup :]


def prompts_of(
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    request: EditRequest,
    templates: Sequence[str],
    *,
    kl: bool,
    merge: bool,
    bare: str = BARE,
) -> list[Prompt]:
    """A request in every template with its target behind it, and the KL prompt up to its lookup token.

    Args:
        index: of the request in its batch.
        kl: whether the KL term counts.
        merge: whether a bare prompt that begins with the subject may stand in for the KL prompt.
        bare: the template without a context, which the KL prompt is put into too.

    Raises:
        SphereError: a subject that is not in its prompt, or that shares its last token with the target.
    """
    what, prompts = f"case {request.case_id}", []
    essence = fill(bare, replace(request, prompt=KL_PROMPT))
    encoded = encode(tokenizer, essence.text)
    kl_ids = encoded.ids[: subject_token(encoded, essence.subject_end, what) + 1]
    for template in templates:
        filled = fill(template, request, bos_text(tokenizer))
        pair = Continued(filled.text, request.target_new, request.joiner)
        ids, start = encode_pair(tokenizer, *pair)
        lookup = subject_token(encode(tokenizer, pair.text), filled.subject_end, what)
        if lookup >= start:
            raise SphereError(
                f"The subject of {what} shares its last token with the target: check the prompt."
            )
        scored = tuple((position - 1, ids[position]) for position in range(start, len(ids)))
        stands_in = kl and merge and ids[: lookup + 1] == kl_ids
        kl = kl and not stands_in
        prompts.append(Prompt(index, template, ids[:-1], lookup, scored, stands_in, template == bare))
    if kl:
        prompts.append(Prompt(index, KL_PROMPT, kl_ids, len(kl_ids) - 1, kl=True))
    return prompts


class MicroBatch:
    """Packed rows computed together: the hidden states that enter the loop, and where they are changed and measured.

    P prompts lie in R rows of C columns; logits are computed at N points (row, column), of which T predict a target's
    token (one per token and prompt) and K belong to KL prompts; two uses of one point share its logits.

    Args:
        rows: the prompts of each packed row, whose suffixes follow each other without seeing each other.
        slots: where the prefix of each prompt lies in the store.
        first, last: layers that the loop runs.

    Attributes:
        recorded: hidden states (R x C x d) entering layer `first`, and how the layers are called on them.
        prompts: the P prompts, row by row.
        kl_reference: (K x vocabulary) log-probabilities of the first step; None before it.
    """

    def __init__(
        self,
        stack: LayerStack,
        store: PrefixStore,
        rows: Sequence[Sequence[Prompt]],
        slots: Mapping[tuple[int, str], Slots],
        first: int,
        last: int,
    ) -> None:
        self.last = last
        segments = [[Segment(slots[prompt.key], prompt.suffix) for prompt in row] for row in rows]
        with torch.no_grad():
            self.recorded: RecordedCalls = stack.record(store.inputs(segments), first, last)
        self.kl_reference: Tensor | None = None
        self.prompts = [prompt for row in rows for prompt in row]
        lookups = _lookups(rows)
        scored = [
            ((row, column + position - prompt.lookup), label, prompt)
            for (row, column), prompt in zip(lookups, self.prompts, strict=True)
            for position, label in prompt.scored
        ]
        kl = [(at, prompt) for at, prompt in zip(lookups, self.prompts, strict=True) if prompt.kl]
        measured = [at for at, *_ in scored] + [at for at, _ in kl]
        points = {at: n for n, at in enumerate(dict.fromkeys(measured))}
        device = self.recorded.hidden.device  # delta's, which need not be that of the token ids

        def tensor(values: Iterable[float], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        self.requests = tensor(prompt.request for prompt in self.prompts)  # (P,) into the batch of requests
        self.lookup_row = tensor(row for row, _ in lookups)  # (P,) in 0..R-1
        self.lookup_column = tensor(column for _, column in lookups)  # (P,) in 0..C-1
        self.point_row = tensor(row for row, _ in points)  # (N,)
        self.point_column = tensor(column for _, column in points)  # (N,)
        self.score_point = tensor(points[at] for at, *_ in scored)  # (T,) into the points
        self.labels = tensor(label for _, label, _ in scored)  # (T,) token ids
        weights = (1 / len(prompt.scored) for *_, prompt in scored)
        self.score_weight = tensor(weights, torch.float32)  # (T,): a target's tokens weigh 1 together
        self.score_request = tensor(prompt.request for *_, prompt in scored)  # (T,)
        self.kl_point = tensor(points[at] for at, _ in kl)  # (K,) into the points
        self.kl_request = tensor(prompt.request for _, prompt in kl)  # (K,)

    def at_lookups(self) -> Tensor:
        """What enters the loop at each prompt's lookup token: (P x d)."""
        return self.recorded.hidden[self.lookup_row, self.lookup_column]


def _lookups(rows: Sequence[Sequence[Prompt]]) -> list[tuple[int, int]]:
    """(row, column) of each prompt's lookup token, which is its suffix's first."""
    found = []
    for number, row in enumerate(rows):
        ends = accumulate(len(prompt.suffix) for prompt in row)
        found += [(number, end - len(prompt.suffix)) for prompt, end in zip(row, ends, strict=True)]
    return found
