"""When a run's checkpoints are written, and what they hold: whole weights, or factors of their change.

    W_n = W_0 + L R^T    L (rows x k), R (columns x k), in the orientation of the model

Knows editors and checkpoints. Reading is `sphere.checkpoints.read_weights`'s, whatever a file holds.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from sphere.checkpoints import LEFT, RIGHT, write_checkpoint
from sphere.editor import Editor
from sphere.factors import Factors
from sphere.low_rank import Decomposition, converted, rounding_norm

log = logging.getLogger(__name__)

WEIGHTS, FACTORS = "weights", "factors"


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        at: numbers of edits at which there is to be one.
        save: WEIGHTS, or FACTORS where they are smaller.
    """

    def __init__(self, folder: Path, editor: Editor, at: Collection[int], save: str) -> None:
        self.folder, self.editor, self.at, self.save = folder, editor, at, save

    def due(self) -> bool:
        """Whether there is to be a checkpoint now."""
        return self.editor.n_edits in self.at

    def write(self, undone: Collection[int] = ()) -> Path:
        """Write one of the editor's weights as they stand."""
        tensors = self.editor.final_weights()
        if self.save == FACTORS:
            tensors = self._with_factors(tensors)
        return write_checkpoint(self.folder, self.editor.n_edits, tensors, undone=undone)

    def _with_factors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The content of a file: factors of the change of each weight that has some which are smaller."""
        content: dict[str, Tensor] = {}
        for name, weight in weights.items():
            factors = self._factors(name, weight)
            if factors is None:
                content[name] = weight
            else:
                left, right = factors if name not in self.editor.weights.transposed else factors[::-1]
                content |= {name + LEFT: left, name + RIGHT: right}
        sizes = [sum(t.numel() * t.element_size() for t in c.values()) for c in (content, weights)]
        log.info("Checkpoint: %.1f MB in place of %.1f MB of whole weights.", *(s / 1e6 for s in sizes))
        return content

    def _factors(self, name: str, saved: Tensor) -> Factors | None:
        """Of the change of a weight (out x in); None where they would not be smaller.

        The change is that of the float32 masters of weights of less than 32 bits: the sum of all updates, rounded once.
        """
        weights, conditioned = self.editor.weights, bool(self.editor.rules.total)
        now = weights.canonical(name, saved) if conditioned else weights.get(name)
        original = weights.canonical(name, self.editor.original[name])
        change = Decomposition(now.double() - original.to(now.device).double())
        writes = 1 if now.dtype.itemsize < 4 else self.editor.n_edits
        rank = change.exact_rank(self.editor.n_edits, rounding_norm(now, now.dtype, writes))
        dtype = torch.float64 if saved.dtype == torch.float64 else torch.float32
        if rank is None or rank * sum(saved.shape) * dtype.itemsize >= saved.numel() * saved.element_size():
            return None
        return converted(change.factors(rank), dtype)
