"""When a request's z is good enough, beside a small loss: most-probable early stopping (ENCORE, arXiv 2502.01636).

Knows the logits at the positions that predict a target's tokens. Knows nothing of how z is moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sphere.hparams import TargetHParams


class EarlyStop:
    """Which requests of a batch may stop after a pass.

    A request stops once all tokens of its target have been the likeliest ones in all of its prompts, each given those
    before it, for `z_stop` further steps in a row; or once the mean probability of these tokens, over the target and
    then over the prompts, is above `z_stop_probability`. Without these keys none does.

    Args:
        n: number of requests.
        prompts_per_request: that are scored.
    """

    def __init__(
        self, hparams: TargetHParams, n: int, prompts_per_request: int, device: torch.device
    ) -> None:
        self.further, self.cutoff = hparams.z_stop, hparams.z_stop_probability
        self.n, self.prompts_per_request, self.device = n, prompts_per_request, device
        self._passes = torch.zeros(n, dtype=torch.long, device=device)  # in a row, targets likeliest
        self.start()

    @property
    def wanted(self) -> bool:
        """Whether there is anything to watch."""
        return self.further is not None or self.cutoff is not None

    def start(self) -> None:
        """Before a pass."""
        self._misses = torch.zeros(self.n, device=self.device)  # tokens that are not the likeliest
        self._probability = torch.zeros(self.n, device=self.device)

    @torch.no_grad()
    def note(self, logits: Tensor, labels: Tensor, requests: Tensor, weights: Tensor) -> None:
        """Part of a pass.

        Args:
            logits: (T x vocabulary), where target tokens are predicted.
            labels: (T,) these tokens.
            requests: (T,) whose they are.
            weights: (T,) 1 / number of the target's tokens.
        """
        if not self.wanted:
            return
        missed = logits.argmax(dim=-1) != labels
        at_label = logits.gather(1, labels[:, None])[:, 0].float()
        probability = (at_label - logits.float().logsumexp(dim=-1)).exp().to(self._probability)
        self._misses.index_add_(0, requests, missed.to(self._misses))
        self._probability.index_add_(0, requests, probability * weights / self.prompts_per_request)

    def reached(self) -> Tensor:
        """After a pass: (n,), whether each request may stop with the z of this pass."""
        found = torch.zeros(self.n, dtype=torch.bool, device=self.device)
        if self.further is not None:
            self._passes = torch.where(self._misses == 0, self._passes + 1, 0)
            found |= self._passes > self.further
        if self.cutoff is not None:
            found |= self._probability > self.cutoff
        return found
