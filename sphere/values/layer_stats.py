"""Second moments E[k k^T] of the edited modules' inputs over a corpus, computed once and kept on disk.

One pass over the corpus collects every layer that is missing and stops at the highest of them. Knows nothing of how
the moments are used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.files import atomic_path, remove_leftovers
from sphere.fingerprint import Fingerprint, tensor_digest
from sphere.forward.layers import LayerStack
from sphere.forward.numerics import numerics
from sphere.forward.padding import group_by_length, pad_right
from sphere.hparams import HParams
from sphere.models import DTYPES
from sphere.values.corpus import MAX_TOKENS, Corpus
from sphere.values.lengths import longest_sequence
from sphere.values.published_moments import PublishedMoments
from sphere.values.tokenization import padding_id

log = logging.getLogger(__name__)

TRANSFER_TOKENS = 8192  # keys that make one product where its sum is on another device

FORMAT = 2  # of the files; a change has all moments computed again
STRIPS = 8  # of a product's rows: (8 + 1) / 16 of it is computed
MIN_STRIP = 64


def layer_stats(
    stack: LayerStack,
    token_ids: Iterable[Sequence[int]],
    *,
    batch_tokens: int,
    pad: int = 0,
    device: torch.device | None = None,
) -> tuple[dict[int, Tensor], int]:
    """E[k k^T] over all tokens, for every edited layer in one pass; float32 blocks added up in float64.

    Args:
        token_ids: documents, each a sequence of token ids.
        batch_tokens: how many (padded) tokens one forward pass may hold.
        device: where the sums are kept, by default with their layers; elsewhere, keys wait for those of later passes,
            so that fewer products travel.

    Returns:
        layer -> (in x in) float64 on `device`, and the number of tokens.
    """
    sums: dict[int, SymmetricSum] = {}
    waiting: dict[int, list[Tensor]] = {}  # layer -> keys, (tokens x in) each
    count = waiting_tokens = 0

    def add_up() -> None:
        for layer, parts in waiting.items():
            keys = torch.cat(parts) if len(parts) > 1 else parts[0]
            if layer not in sums:
                sums[layer] = SymmetricSum(keys.shape[1], device or keys.device)
            sums[layer].add(keys)
        waiting.clear()

    with torch.no_grad():
        for batch in _batches(token_ids, batch_tokens):
            width = max(len(ids) for ids in batch)
            ids = pad_right(batch, width, pad, stack.device)
            lengths = torch.tensor([len(x) for x in batch], device=stack.device)
            mask = torch.arange(width, device=stack.device)[None] < lengths[:, None]  # rows x width
            inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
            for layer, k in stack.module_inputs(inputs).items():
                waiting.setdefault(layer, []).append(k[mask.to(k.device)])
            tokens = sum(len(x) for x in batch)
            count, waiting_tokens = count + tokens, waiting_tokens + tokens
            if device is None or waiting_tokens >= TRANSFER_TOKENS:
                add_up()
                waiting_tokens = 0
        add_up()
    if not count:
        raise SphereError("The corpus of the second moments holds no tokens: give mom2_dataset another one.")
    return {layer: total.whole().div_(count) for layer, total in sums.items()}, count


class SymmetricSum:
    """Sum of k k^T (in x in) in float64: only its lower triangle is computed, a strip of rows at a time.

    Args:
        size: in.
        device: where the sum is kept; the products are computed where the keys are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)
        height = max(MIN_STRIP, -(-size // STRIPS))
        self.strips = [(start, min(start + height, size)) for start in range(0, size, height)]

    def add(self, keys: Tensor) -> None:
        """Add keys (tokens x in), multiplied in float32."""
        half_precision = keys.is_cuda and keys.dtype in (torch.bfloat16, torch.float16)
        keys = keys if half_precision else keys.float()
        for start, end in self.strips:
            left, right = keys[:, start:end].T, keys[:, :end]
            # A GPU multiplies half precision as it is: the products are exact in the float32 that it adds up in.
            product = torch.mm(left, right, out_dtype=torch.float32) if half_precision else left @ right
            self.total[start:end, :end] += product.to(self.total.device)

    def whole(self) -> Tensor:
        """The symmetric sum."""
        for start, end in self.strips:
            self.total[:start, start:end] = self.total[start:end, :start].T
        return self.total


def _batches(token_ids: Iterable[Sequence[int]], budget: int) -> Iterator[list[Sequence[int]]]:
    """Documents of similar length together, drawn from a window of the stream."""
    window: list[Sequence[int]] = []

    def flush() -> Iterator[list[Sequence[int]]]:
        for group in group_by_length([len(ids) for ids in window], budget):
            yield [window[i] for i in group]
        window.clear()

    for ids in token_ids:
        window.append(ids)
        if sum(map(len, window)) >= 16 * budget:
            yield from flush()
    yield from flush()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other process is at this folder; of the jobs of a sweep one computes, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # goes with the process that holds it, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process is computing what belongs in %s: waiting for it.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class SecondMoments:
    """The second moments of a model's edited layers, from disk where they are, else computed and saved.

    On disk there may be those of earlier runs, and those that other projects have published, in their own places.

    Args:
        folder: e.g. data/stats/SmolLM2-135M.
        stats_from: a file or a folder of published ones that are to be used whatever else there is.
        keep_on_cpu: hand them out on the CPU (`--conserve_memory`).
        fingerprint: of the stack's model, where it is taken already.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        hparams: HParams,
        folder: str | Path,
        *,
        seed: int = 0,
        batch_tokens: int = 4096,
        keep_on_cpu: bool = False,
        progress: bool = True,
        fingerprint: Fingerprint | None = None,
        stats_from: str | Path | None = None,
    ) -> None:
        self.stack, self.tokenizer, self.hparams = stack, tokenizer, hparams
        given = None if stats_from is None else Path(stats_from)
        self.published = PublishedMoments(stack, tokenizer, hparams, Path(folder), given)
        self.folder, self.seed, self.batch_tokens = Path(folder), seed, batch_tokens
        self.keep_on_cpu, self.progress = keep_on_cpu, progress
        self.fingerprint = fingerprint or Fingerprint(stack.model)
        self._kept: dict[int, Tensor] = {}

    def get(self, layer: int) -> Tensor:
        """E[k k^T] of a layer: (in x in) in `mom2_dtype`, on the layer's device unless `keep_on_cpu`."""
        if layer not in self._kept:
            self._load_or_compute()
        moment = self._kept[layer]
        target = self.stack.devices[layer]
        return moment if self.keep_on_cpu else moment.to(target)

    def set(self, layer: int, moment: Tensor) -> None:
        """Use a given second moment (in x in) instead of one from a corpus."""
        self._kept[layer] = moment

    @cached_property
    def corpus(self) -> Corpus:
        """The text that they are taken over."""
        positions = longest_sequence(self.stack.model) or MAX_TOKENS
        return Corpus(
            self.hparams.mom2_dataset,
            self.hparams.mom2_n_samples,
            self.seed,
            min(MAX_TOKENS, positions),
            self.stack.model,
            self.tokenizer,
            self.fingerprint.now(),
        )

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides the numbers but the code: the model, the text, how passes and sums are cut, the
        machine. What is found again is what would be computed, as far as a device does twice the same."""
        return {
            "format": FORMAT,
            "model": self.corpus.fingerprint,
            "numerics": numerics(self.stack.model),
            "batch_tokens": self.batch_tokens,
            "summed_on_cpu": self.keep_on_cpu,
            "dtype": self.hparams.mom2_dtype,
            "corpus": self.corpus.key,
        }

    def digest(self) -> str:
        """SHA-256 of the numbers of all edited layers, as `use` finds them again."""
        for layer in self.hparams.layers:
            self.get(layer)
        return _combined({layer: tensor_digest(self._kept[layer]) for layer in self.hparams.layers})

    def use(self, digest: str) -> bool:
        """Take the moments with this digest, on whatever machine they were computed; False where there are none."""
        names = {layer: self._file_name(layer) for layer in self.hparams.layers}
        for folder in sorted(path for path in self.folder.glob("*") if path.is_dir()):
            parts = {layer: _digest_in(folder / name) for layer, name in names.items()}
            if None in parts.values() or _combined(parts) != digest:
                continue
            found = {layer: self._read(folder / name) for layer, name in names.items()}
            moments = {layer: moment for layer, moment in found.items() if moment is not None}
            if len(moments) == len(names):
                self._kept |= moments
                return True
        moments = self.published.read(self.hparams.layers)
        if _combined({layer: tensor_digest(moment) for layer, moment in moments.items()}) != digest:
            return False
        self._kept |= moments
        return True

    def path(self, layer: int) -> Path:
        """Where a layer's second moment is kept."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        source = Path(self.hparams.mom2_dataset).stem
        return self.folder / f"{source}_{self.hparams.mom2_n_samples}_{digest}" / self._file_name(layer)

    def _file_name(self, layer: int) -> str:
        return f"{self.hparams.rewrite_module_tmp.format(layer)}.safetensors"

    def _load_or_compute(self) -> None:
        if self.published.given is not None:
            self._kept |= self.published.read([x for x in self.hparams.layers if x not in self._kept])
        missing = self._load()
        if missing:
            self._kept |= self.published.read(missing)
            missing = [layer for layer in missing if layer not in self._kept]
        if not missing:
            return
        log.info("Second moments of layers %s are not in %s: computing them.", missing, self.folder)
        folder = self.path(missing[0]).parent
        with _alone(folder):
            remove_leftovers(folder)  # of killed jobs: a gigabyte each for a 7B model
            if self._load():  # still: no other job has computed them meanwhile
                self._compute()

    def _load(self) -> list[int]:
        """Take up what is on disk; the layers that are missing there."""
        missing = []
        for layer in self.hparams.layers:
            moment = self._kept.get(layer)
            if moment is None:
                moment = self._read(self.path(layer))
            if moment is None:
                missing.append(layer)
            else:
                self._kept[layer] = moment
        return missing

    def _read(self, path: Path) -> Tensor | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                moment, digest = file.get_tensor("second_moment"), (file.metadata() or {}).get("sha256")
            reason = None if tensor_digest(moment) == digest else "its content is not what was written"
        except SafetensorError as error:
            reason = str(error)
        if reason:
            log.warning("The second moment in %s is damaged (%s): computing it again.", path, reason)
            return None
        return moment

    def _compute(self) -> None:
        h = self.hparams
        bar = tqdm(
            self.corpus.documents(self.progress),
            total=h.mom2_n_samples,
            desc="second moments",
            unit="doc",
            disable=not self.progress,
            leave=False,
        )
        moments, tokens = layer_stats(
            self.stack,
            bar,
            batch_tokens=self.batch_tokens,
            pad=padding_id(self.tokenizer),
            device=torch.device("cpu") if self.keep_on_cpu else None,
        )
        rate = bar.format_dict["elapsed"]
        log.info("Second moments over %d tokens, %.0f tokens/s.", tokens, tokens / max(rate, 1e-9))
        key = json.dumps(self.key)
        for layer, moment in moments.items():
            moment = moment.to("cpu", DTYPES[h.mom2_dtype])
            if not torch.isfinite(moment).all():
                raise SphereError(f"The second moment of layer {layer} is not finite: try the dtype float32.")
            metadata = {"key": key, "tokens": str(tokens), "sha256": tensor_digest(moment)}
            with atomic_path(self.path(layer)) as temporary:
                save_file({"second_moment": moment.contiguous()}, temporary, metadata=metadata)
            self._kept[layer] = moment


def _combined(digests: Mapping[int, str | None]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _digest_in(path: Path) -> str | None:
    """The digest of the numbers in a file, as its header says; None where there is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        return None
