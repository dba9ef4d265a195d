"""Target values z on disk, so that runs which share them do not optimise them again (`--use_cache`).

AlphaEdit, MEMIT and its kin optimise the same z for their first batch, on the unedited model; a batch that was broken
off, or a run that is repeated, finds its own again.

    <cache_dir>/z/<digest of the key>.safetensors     z, h0, losses and steps of one batch; the key in the metadata

The key holds everything that the numbers depend on, rounding included: the weights as they stand, the model's
configuration, attention and dtype, the requests as the tokenizer cuts them, the hyperparameters of the optimisation,
the batch and the tokens of a micro-batch as they were chosen, the code that finds z, the versions of PyTorch and
transformers, the kind of device and on a CPU the number of threads. So a stale value is never used; on a device that
does twice the same (a CPU does, a GPU's sums may come in another order), a run with a cache writes the same weights,
bit for bit, as one without. The price is that values are kept per batch: a request's z depends on its companions by
rounding only (they share matrix products, never a sum), but another batch size finds nothing.

Any file may be removed at any time. Knows nothing of how z is optimised or used.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.files import atomic_path
from sphere.fingerprint import Fingerprint, tensor_digest
from sphere.forward.layers import LayerStack
from sphere.forward.numerics import numerics
from sphere.forward.remaining import adds_as_is
from sphere.hparams import TargetHParams
from sphere.requests import EditRequest
from sphere.values.chat_template import in_turn
from sphere.values.compute_z import TargetValues, compute_z
from sphere.values.context_templates import BARE, fill
from sphere.values.tokenization import bos_text, encode, encode_pair
from sphere.values.z_batches import KL_PROMPT

log = logging.getLogger(__name__)

FIELDS = ("z", "h0", "losses", "steps")
# What the optimisation reads of the hyperparameters; of the edited layers the last one, and all of them
# and which matrix is edited where they bound z.
HPARAMS = (
    "clamp_norm_factor",
    "v_num_grad_steps",
    "v_lr",
    "v_loss_layer",
    "v_weight_decay",
    "kl_factor",
    "fact_token",
    "z_stop",
    "z_stop_probability",
    "layer_module_tmp",
    "ln_f_module",
    "lm_head_module",
)


class TargetValueCache:
    """Target values of batches, kept under keys that nothing stale can match.

    Args:
        folder: e.g. data/cache.
        fingerprint: of the model that is being edited.
        bare: the template without a context, which the KL prompt is put into too.
    """

    def __init__(
        self,
        folder: str | Path,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: Fingerprint,
        bare: str = BARE,
    ) -> None:
        self.folder = Path(folder) / "z"
        self.stack, self.tokenizer, self.fingerprint, self.bare = stack, tokenizer, fingerprint, bare

    def get(
        self,
        requests: Sequence[EditRequest],
        templates: Sequence[Sequence[str]],
        hparams: TargetHParams,
        compute: Callable[[], TargetValues],
        *,
        batch_tokens: int,
        matmul_dtype: torch.dtype | None,
    ) -> TargetValues:
        """The target values of a batch on the weights as they stand: from disk, else computed and kept.

        Args:
            batch_tokens: that a micro-batch of `compute` really holds.
            matmul_dtype: in which it multiplies; None: the model's own.
        """
        key = self.key(requests, templates, hparams, batch_tokens, matmul_dtype)
        path = self.path(key)
        found = self._read(path, key, len(requests))
        if found is not None:
            level = logging.INFO if len(requests) > 1 else logging.DEBUG  # ROME asks for every fact
            log.log(level, "Target values of %d requests: from %s.", len(requests), path)
            return found
        values = compute()
        try:
            _write(path, values, key)
        except SphereError as error:  # the cache is a help, not a result
            log.warning("Target values were not cached: %s", error)
        return values

    def key(
        self,
        requests: Sequence[EditRequest],
        templates: Sequence[Sequence[str]],
        hparams: TargetHParams,
        batch_tokens: int,
        matmul_dtype: torch.dtype | None,
    ) -> dict[str, Any]:
        """Everything that the numbers depend on, JSON-able."""
        prompts = [self._prompts(request, [t for group in templates for t in group]) for request in requests]
        bounded = not adds_as_is(self.stack, encode(self.tokenizer, requests[0].text).ids)
        reach = {"layers": list(hparams.layers), "rewrite_module_tmp": hparams.rewrite_module_tmp}
        return {
            "weights": self.fingerprint.now(),
            **numerics(self.stack.model),
            "code": self._code,
            "z_layer": max(hparams.layers),
            **(reach if bounded else {}),  # of the edited modules, which bounds z
            "hparams": {name: getattr(hparams, name) for name in HPARAMS},
            "templates": [list(group) for group in templates],
            "requests": _digest(prompts),
            "batch_tokens": batch_tokens,
            "matmul_dtype": str(matmul_dtype),
        }

    def path(self, key: dict[str, Any]) -> Path:
        """The file of a key."""
        return self.folder / f"{_digest(key)}.safetensors"

    def _prompts(self, request: EditRequest, templates: Sequence[str]) -> list[Any]:
        """A request in words, and in the tokens of every text that the optimisation runs."""
        filled = [fill(template, request, bos_text(self.tokenizer)) for template in templates]
        texts = [*(f.text for f in filled), in_turn(self.bare, KL_PROMPT.format(request.subject))]
        encoded = [encode(self.tokenizer, text) for text in texts]
        return [
            [request.prompt, request.subject, request.target_new],
            [[e.ids, e.ends] for e in encoded],
            [encode_pair(self.tokenizer, f.text, request.target_new, request.joiner) for f in filled],
        ]

    @cached_property
    def _code(self) -> str:
        """Of what finds z, and all that it imports from this package."""
        return _digest(_sources(compute_z.__module__))

    def _read(self, path: Path, key: dict[str, Any], n_requests: int) -> TargetValues | None:
        """The values in a file; None where there is none, or (with a warning) where it cannot be trusted."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in FIELDS}
            sound = (
                json.loads(metadata["key"]) == key
                and metadata["sha256"] == _checksum(tensors)
                and all(len(t) == n_requests for t in tensors.values())
            )
            reason = "its content is not what was written"
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            sound, reason = False, str(error)
        if not sound:
            log.warning("The target values in %s are damaged (%s): computing them again.", path, reason)
            return None
        layer = self.stack.layers[key["z_layer"]]
        device = next(layer.parameters()).device
        return TargetValues(**{name: tensor.to(device) for name, tensor in tensors.items()})


def _write(path: Path, values: TargetValues, key: dict[str, Any]) -> None:
    tensors = {name: getattr(values, name).detach().cpu().contiguous() for name in FIELDS}
    metadata = {"key": json.dumps(key), "sha256": _checksum(tensors)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the numbers: safetensors itself would not notice a bit that has flipped."""
    return _digest([[name, tensor_digest(tensors[name])] for name in FIELDS])


def _sources(module: str) -> dict[str, str]:
    """Name -> source of a module, and of all of this package that it imports, directly or not."""
    package, found, todo = module.partition(".")[0], {}, [module]
    while todo:
        name = todo.pop()
        path = importlib.import_module(name).__file__
        if name in found or path is None:
            continue
        found[name] = Path(path).read_text("utf-8")
        for node in ast.walk(ast.parse(found[name])):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            todo += [imported for imported in names if imported.startswith(f"{package}.")]
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
