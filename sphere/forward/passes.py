"""How forward passes are cut: one value from the command line to every pass of the model, and to the memory plan.

Knows numbers of tokens and dtypes. Knows nothing of what is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that flags and their help can be made without loading it
    import torch

# Tokens of a forward pass without a gradient, by kind of device: of editing, and of scoring.
EDITING_TOKENS = 2048
SCORING_TOKENS = {"cpu": 2048}
SCORING_TOKENS_ON_GPU = 16384
DECODING_TOKENS = 8192  # prompt tokens whose continuations are generated together


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How passes are cut and computed.

    Attributes:
        batch_tokens: (padded) tokens that one pass may hold; None: what suits the device and the kind of pass. A single
            sequence that is longer is a pass of its own.
        conserve_memory: what is needed now and then stays on the CPU: second moments and what is made of them, earlier
            keys and the solve with them, the weights before a batch and before the first one, and those that scoring
            puts back; small passes.
        z_matmul_dtype: dtype in which the layers above z multiply while z is sought; None: the model's own.
    """

    batch_tokens: int | None = None
    conserve_memory: bool = False
    z_matmul_dtype: torch.dtype | None = None

    @property
    def offload_device(self) -> str | None:
        """Where what is needed now and then is kept: "cpu" where memory is saved, None where it is made otherwise."""
        return "cpu" if self.conserve_memory else None

    @property
    def editing_tokens(self) -> int:
        """Of a pass without a gradient while editing: keys, second moments."""
        return self.batch_tokens or EDITING_TOKENS

    def scoring_tokens(self, device: torch.device | str) -> int:
        """Of a pass that scores prompts."""
        if self.batch_tokens or self.conserve_memory:
            return self.editing_tokens
        return SCORING_TOKENS.get(str(device).partition(":")[0], SCORING_TOKENS_ON_GPU)

    @property
    def decoding_tokens(self) -> int:
        """Prompt tokens, with padding, whose continuations are generated together."""
        if self.batch_tokens or self.conserve_memory:
            return self.editing_tokens
        return DECODING_TOKENS
