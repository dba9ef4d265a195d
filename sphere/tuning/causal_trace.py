"""Causal tracing: at which layers the subject's last token carries what the model needs to recall a fact.

Meng et al. 2022 (ROME, arXiv 2202.05262), section 2. Of a prompt whose next token o the model knows, three runs:

    clean        P[o]
    corrupted    P*[o]        Gaussian noise on the embeddings of the subject's tokens
    restored     P*_l[o]      corrupted, but for the clean hidden state leaving layer l at the subject's last token

The indirect effect of layer l is IE_l = P*_l[o] - P*[o]; its mean over draws of noise and facts is the average indirect
effect (AIE). Noise has `NOISE_FACTOR` times the standard deviation of the subjects' embeddings.

All facts and draws run together, and of each row only what can change: positions before the subject's last token are
run once (their attention keys and values are kept), and a restored state only above its layer.

Knows tokens and a `LayerStack`. Knows nothing of what is done with the effects.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.forward.layers import LayerStack
from sphere.forward.modules import inference
from sphere.forward.packing import Scored
from sphere.forward.padding import group_by_length, pad_left, pad_right
from sphere.forward.scorer import PackedScorer
from sphere.values.joiner import Continued
from sphere.values.tokenization import encode, subject_token

NOISE_FACTOR = 3.0  # standard deviations of the subjects' embeddings
CHUNK = 64  # candidates that are asked for together


@dataclass(frozen=True)
class Statement:
    """A fact in words: `prompt` (with `{}` for the subject) is continued by `answer`."""

    prompt: str
    subject: str
    answer: str


@dataclass(frozen=True)
class TracedFact:
    """A prompt in tokens, and the token that should follow.

    Attributes:
        ids: the prompt's tokens.
        first, lookup: positions of the subject's first and last token.
        answer: the token that follows.
    """

    text: str
    ids: tuple[int, ...]
    first: int
    lookup: int
    answer: int


@dataclass(frozen=True)
class Trace:
    """Probabilities of the known next token o of F facts, in D draws of noise, with L layers restored one by one.

    Attributes:
        clean: P[o], (F,).
        corrupted: P*[o], (F x D).
        restored: P*_l[o], (F x D x L).
    """

    clean: Tensor
    corrupted: Tensor
    restored: Tensor

    @property
    def indirect(self) -> Tensor:
        """IE_l of each fact, the mean over draws: (F x L)."""
        return (self.restored - self.corrupted[..., None]).mean(dim=1)

    @property
    def average(self) -> Tensor:
        """AIE_l, (L,)."""
        return self.indirect.mean(dim=0)


def cut(tokenizer: PreTrainedTokenizerBase, statement: Statement) -> TracedFact | None:
    """A statement in tokens; None where nothing stands between its subject and its answer."""
    text = statement.prompt.replace("{}", statement.subject)
    begin = statement.prompt.index("{}")
    encoded = encode(tokenizer, Continued(text, statement.answer).text)
    start = encoded.token_at(len(text))
    lookup = subject_token(encoded, begin + len(statement.subject.rstrip()), repr(text))
    if lookup >= start - 1:
        return None
    return TracedFact(text, tuple(encoded.ids[:start]), encoded.token_at(begin), lookup, encoded.ids[start])


def known_facts(
    scorer: PackedScorer, tokenizer: PreTrainedTokenizerBase, statements: Iterable[Statement], wanted: int
) -> list[TracedFact]:
    """The first `wanted` statements whose answer begins with the token that the model finds likeliest.

    Args:
        scorer: of the unedited model.
    """
    found: list[TracedFact] = []
    left = iter(statements)
    while len(found) < wanted and (chunk := list(islice(left, CHUNK))):
        facts = [fact for fact in (cut(tokenizer, statement) for statement in chunk) if fact]
        asked = {fact: Scored((*fact.ids, fact.answer), len(fact.ids)) for fact in facts}
        scores = scorer.score(list(dict.fromkeys(asked.values())))
        found += [fact for fact in facts if scores[asked[fact]].predicted[0] == fact.answer]
    return found[:wanted]


@torch.no_grad()
def subject_noise(embedding: nn.Module, facts: Sequence[TracedFact], draws: int, seed: int) -> list[Tensor]:
    """Noise for the embeddings of each fact's subject: (draws x subject tokens x d) per fact, on the CPU.

    Args:
        embedding: token ids -> embeddings, as the model uses them.
    """
    device = next(embedding.parameters()).device
    subjects = [fact.ids[fact.first : fact.lookup + 1] for fact in facts]
    embedded = embedding(torch.tensor([token for ids in subjects for token in ids], device=device)).float()
    sigma = NOISE_FACTOR * float(embedded.std())
    generator = torch.Generator().manual_seed(seed)
    size = embedded.shape[-1]
    return [sigma * torch.randn(draws, len(ids), size, generator=generator) for ids in subjects]


@torch.no_grad()
def causal_trace(
    stack: LayerStack,
    facts: Sequence[TracedFact],
    noise: Sequence[Tensor],
    *,
    batch_tokens: int,
    pad: int = 0,
    progress: bool = True,
) -> Trace:
    """Trace facts through all layers.

    Args:
        noise: of each fact, (D x subject tokens x d).
        batch_tokens: how many (padded) tokens one forward pass may compute.
        pad: token id to fill rows with.
    """
    draws = len(noise[0])
    rows = [_Row(n, fact, noise[n][draw]) for n, fact in enumerate(facts) for draw in range(draws)]
    corrupted = torch.empty(len(rows))
    restored = torch.empty(len(rows), stack.n_layers)
    with inference(stack.model):
        clean, states = _clean(stack, facts, batch_tokens, pad)  # F; L of (F x d)
        groups = _groups(stack, rows, batch_tokens)
        with tqdm(total=len(rows), desc="causal tracing", unit="run", disable=not progress) as bar:
            for group in groups:
                part = _Suffixes(stack, [rows[i] for i in group], pad)
                of_fact = torch.tensor([rows[i].number for i in group])
                hidden = part.entering
                for layer in range(stack.n_layers):
                    hidden = part.layer(hidden, layer)
                    patched = hidden.clone()
                    patched[:, 0] = states[layer][of_fact].to(hidden)  # the lookup token is each row's first
                    restored[group, layer] = part.probability(patched, layer + 1)
                corrupted[group] = part.probability(hidden, stack.n_layers)
                bar.update(len(group))
    return Trace(clean, corrupted.view(len(facts), draws), restored.view(len(facts), draws, stack.n_layers))


def _clean(
    stack: LayerStack, facts: Sequence[TracedFact], batch_tokens: int, pad: int
) -> tuple[Tensor, list[Tensor]]:
    """P[o] of each fact (F,), and what leaves each layer at the lookup token: L of (F x d)."""
    rows = [_Row(n, fact, None) for n, fact in enumerate(facts)]
    clean = torch.empty(len(facts))
    states: list[list[Tensor]] = [[] for _ in range(stack.n_layers)]
    order: list[int] = []
    for group in _groups(stack, rows, batch_tokens):
        part = _Suffixes(stack, [rows[i] for i in group], pad)
        hidden = part.entering
        for layer in range(stack.n_layers):
            hidden = part.layer(hidden, layer)
            states[layer].append(hidden[:, 0].cpu())
        clean[group] = part.probability(hidden, stack.n_layers)
        order += group
    back = torch.tensor(order).argsort()
    return clean, [torch.cat(parts)[back] for parts in states]


@dataclass(frozen=True)
class _Row:
    """One run: a fact (its number among all) and the noise on its subject, (subject tokens x d); None: clean."""

    number: int
    fact: TracedFact
    noise: Tensor | None


def _groups(stack: LayerStack, rows: Sequence[_Row], batch_tokens: int) -> list[list[int]]:
    return group_by_length([len(row.fact.ids) for row in rows], batch_tokens, stack.pass_overhead)


class _Suffixes:
    """Rows from the lookup token on, behind what was kept of the positions before it.

    Attributes:
        entering: what enters the first layer, (rows x columns x d).
    """

    def __init__(self, stack: LayerStack, rows: Sequence[_Row], pad: int) -> None:
        self.stack, device = stack, stack.device
        facts = [row.fact for row in rows]
        lengths = [len(fact.ids) - fact.lookup for fact in facts]
        before, after = max(fact.lookup for fact in facts), max(lengths)
        self.answers = torch.tensor([fact.answer for fact in facts])
        self.row, self.last = torch.arange(len(rows)), torch.tensor(lengths) - 1
        ids = torch.cat(
            [
                pad_left([fact.ids[: fact.lookup] for fact in facts], before, pad, device),
                pad_right([fact.ids[fact.lookup :] for fact in facts], after, pad, device),
            ],
            dim=1,
        )  # rows x (before + after)
        present = torch.zeros_like(ids)
        positions = torch.zeros_like(ids)
        for n, fact in enumerate(facts):
            here = slice(before - fact.lookup, before - fact.lookup + len(fact.ids))
            present[n, here] = 1
            positions[n, here] = torch.arange(len(fact.ids), device=device)
        self.noise = self._laid_out(rows, before, ids.shape)
        inputs: dict[str, Any] = {"attention_mask": present, "use_cache": before > 0}
        if before:
            prefix = {"input_ids": ids[:, :before], "position_ids": positions[:, :before]}
            with _added(stack, self.noise, slice(before)):
                inputs[stack.cache_argument] = stack.fill_cache(
                    {**prefix, "attention_mask": present[:, :before]}
                )
        inputs |= {"input_ids": ids[:, before:], "position_ids": positions[:, before:]}
        with _added(stack, self.noise, slice(before, None)):
            self.recorded = stack.record(inputs, 0, stack.n_layers - 1)
        self.entering = self.recorded.hidden

    def _laid_out(self, rows: Sequence[_Row], before: int, shape: torch.Size) -> Tensor | None:
        """The noise where the subjects lie, (rows x positions x d); None for clean rows."""
        whole: Tensor | None = None
        for n, row in enumerate(rows):
            if row.noise is None:
                continue
            if whole is None:
                whole = torch.zeros(*shape, row.noise.shape[-1])
            start = before - row.fact.lookup + row.fact.first
            whole[n, start : before + 1] = row.noise
        return whole

    def layer(self, hidden: Tensor, layer: int) -> Tensor:
        """What leaves a layer that `hidden` (rows x columns x d) enters."""
        return self.stack.run(self.recorded, hidden, layer, layer)

    def probability(self, hidden: Tensor, first: int) -> Tensor:
        """P[o] (rows,) for hidden states entering layer `first`; on the CPU."""
        last = self.stack.n_layers - 1
        at_last = self.stack.run_at(self.recorded, hidden, first, last, self.row, self.last)  # rows x d
        probabilities = self.stack.logits(at_last).softmax(dim=-1)  # rows x vocabulary
        device = probabilities.device
        return probabilities[self.row.to(device), self.answers.to(device)].cpu()


@contextmanager
def _added(stack: LayerStack, noise: Tensor | None, columns: slice) -> Iterator[None]:
    """Within the block the embeddings carry these columns of the noise (rows x positions x d)."""
    if noise is None:
        yield
        return

    def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + noise[:, columns].to(output)

    handle = stack.model.get_input_embeddings().register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def choose_layers(average: Tensor, count: int, editable: Sequence[int]) -> tuple[int, ...]:
    """`count` consecutive layers of those that can be edited, ending where the average indirect effect is largest.

    As MEMIT (arXiv 2210.07229, section 4.2) chooses them. Where fewer lie below the peak, the first ones.

    Args:
        average: AIE, (L,).
        editable: numbers of layers, increasing.
    """
    end = max(bisect_right(editable, int(average.argmax())), count)
    return tuple(editable[end - count : end])
