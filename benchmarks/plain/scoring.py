"""Scoring of one record at a time: all its sequences in one padded forward pass, with all logits."""

from __future__ import annotations

from typing import Any

import torch

from sphere.evaluation.scoring import RecordScorer
from sphere.forward.packing import Scored, TokenScores


class PlainScorer:
    """One forward pass per record, right-padded, full logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def score(self, sequences: list[Scored], progress: Any = None) -> dict[Scored, TokenScores]:
        """Score the sequences of one record."""
        length = max(len(scored.ids) for scored in sequences)
        device = self.model.get_input_embeddings().weight.device
        ids = torch.zeros(len(sequences), length, dtype=torch.long, device=device)  # (B, L)
        mask = torch.zeros_like(ids)
        for b, scored in enumerate(sequences):
            ids[b, : len(scored.ids)] = torch.tensor(scored.ids)
            mask[b, : len(scored.ids)] = 1
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)
        results = {}
        for b, scored in enumerate(sequences):
            at = logits[b, scored.start - 1 : len(scored.ids) - 1].float()  # (T, V)
            tokens = torch.tensor(scored.ids[scored.start :], device=device)
            nll = -at.log_softmax(-1)[torch.arange(len(tokens)), tokens]
            results[scored] = TokenScores(nll.double().cpu().numpy(), at.argmax(-1).cpu().numpy())
        return results


def plain_scorer(model: Any, tokenizer: Any) -> RecordScorer:
    """The project's metrics on top of `PlainScorer`; give it one record at a time."""
    scorer = RecordScorer(model, tokenizer)
    scorer.scorer = PlainScorer(model)  # type: ignore[assignment]
    return scorer
