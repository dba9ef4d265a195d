"""Second moments that projects of the ROME family have computed and published: found, read and checked.

Their files are <stats_dir>/<model>/<dataset>_stats/<module>_<dtype>_mom2_<n>.npz, with the arrays mom2.mom2, the sum of
k k^T over all tokens (in x in), and mom2.count, the number of tokens. A .npz is a zip archive of plain arrays: they are
read row by row, nothing in them is executed. Knows nothing of how moments are computed or used.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.hparams import HParams
from sphere.linalg import extreme_eigenvalues
from sphere.models import DTYPES
from sphere.resources import find
from sphere.values.lengths import longest_sequence
from sphere.values.tokenization import truncated_ids

log = logging.getLogger(__name__)

ROWS = 256  # of a matrix that are read and checked at a time
# What rounding does, relative to the bound sqrt(M_ii M_jj) of an entry, and to the largest eigenvalue.
ROUNDING = 1e-2
NEGATIVE = 1e-3
# A sample of the model's own keys: so many tokens, and what it may differ by in the median of its mean squares.
SAMPLE, SAMPLE_TEXT = 400, "data/fixed_text.txt"
UNLIKELY, IMPOSSIBLE = 5.0, 100.0
UNRELATED = 0.1  # rank correlation of the mean squares; between layers of one model it is near 0


@dataclass(frozen=True)
class PublishedFile:
    """A file of published moments, and what its name says: of what, how kept, over how many documents (None: all)."""

    path: Path
    dtype: str
    samples: int | None

    @property
    def dataset(self) -> str:
        """The corpus, as its folder says."""
        return self.path.parent.name.removesuffix("_stats")


def published_files(folder: Path, module: str) -> list[PublishedFile]:
    """The files in a folder, or below it, whose names say that they are of a module."""
    pattern = re.compile(
        rf"{re.escape(module)}_(b?float\d+)_(?:[a-z_]+-)*mom2(?:-[a-z_]+)*(?:_t(?:\d+|{{\w+}}))?(?:_(\d+))?\.npz"
    )
    found = []
    for path in sorted(folder.rglob("*.npz")) if folder.is_dir() else []:
        if match := pattern.fullmatch(path.name):
            samples = int(match[2]) if match[2] else None
            found.append(PublishedFile(path, match[1], samples))
    return found


class PublishedMoments:
    """The published moments of a model's edited layers.

    Args:
        folder: where they are looked for, e.g. data/stats/Qwen2.5-7B-Instruct; the folders beside it that those
            projects would have called the model by, too.
        given: a file, or a folder of them, to be used instead.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        hparams: HParams,
        folder: Path,
        given: Path | None = None,
    ) -> None:
        self.stack, self.tokenizer, self.hparams = stack, tokenizer, hparams
        self.folder, self.given = folder, given

    def read(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Layer -> E[k k^T] (in x in) in `mom2_dtype`, on the CPU, of those layers that have one.

        Raises:
            SphereError: a given file or folder without a layer's moment, or a moment that cannot be this model's.
        """
        self._check_given()
        files = {layer: file for layer in layers if (file := self._file(layer))}
        if not files:
            return {}
        own, moments = self._mean_squares(), {}
        for layer, file in files.items():
            moments[layer] = read_moment(file.path, len(own[layer]), DTYPES[self.hparams.mom2_dtype])
            _compare(moments[layer].diagonal(), own[layer], file.path)
        places = ", ".join(sorted({str(file.path.parent) for file in files.values()}))
        log.info("Second moments of layers %s: read from %s, not computed.", list(moments), places)
        return moments

    def _file(self, layer: int) -> PublishedFile | None:
        module, h = self.hparams.rewrite_module_tmp.format(layer), self.hparams
        if self.given is None:
            found = [file for folder in self._places() for file in published_files(folder, module)]
            wanted = [f for f in found if (f.dataset, f.samples) == (h.mom2_dataset, h.mom2_n_samples)]
            return max(wanted, key=lambda file: file.dtype == h.mom2_dtype, default=None)
        if self.given.is_file():
            return PublishedFile(self.given, h.mom2_dtype, None)
        found = published_files(self.given, module)
        return _only_one(found, self.given, module, h)

    def _places(self) -> list[Path]:
        """The folders in which those projects keep a model's moments."""
        name = str(getattr(self.stack.model.config, "name_or_path", "") or "")
        names = (name.replace("/", "_"), name.rstrip("/").rpartition("/")[2])
        beside = [self.folder.parent / name for name in names if name.strip("._")]
        folders = dict.fromkeys([self.folder, *beside])
        return [folder / f"{self.hparams.mom2_dataset}_stats" for folder in folders]

    def _check_given(self) -> None:
        """What can be wrong with the given path before anything is read.

        Raises:
            SphereError: no such path, or one file for several layers.
        """
        if self.given is None:
            return
        if not self.given.exists():
            raise SphereError(
                f"There is nothing at {self.given}: give a file or a folder of second moments.",
                argument="stats_from",
            )
        if self.given.is_file() and len(self.hparams.layers) > 1:
            raise SphereError(
                f"{self.given} is one file, and layers {list(self.hparams.layers)} are edited: give the folder that "
                "holds one for each.",
                argument="stats_from",
            )

    def _mean_squares(self) -> dict[int, Tensor]:
        """Layer -> mean of k^2 (in), float64, over a text; its first token, which many models treat apart, left out."""
        text = find(SAMPLE_TEXT).read_text("utf-8")
        length = min(SAMPLE, longest_sequence(self.stack.model) or SAMPLE)
        ids = torch.tensor([truncated_ids(self.tokenizer, text, length)], device=self.stack.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad():
            keys = self.stack.module_inputs(inputs)  # layer -> 1 x tokens x in
        return {layer: k[0, 1:].double().square().mean(0).cpu() for layer, k in keys.items()}


def _compare(theirs: Tensor, own: Tensor, path: Path) -> None:
    """Compare mean squares of keys (in) with those on a short text of this project's own.

    Raises:
        SphereError: they differ by a factor that no corpus makes.
    """
    pair = torch.stack([theirs.double(), own])  # 2 x in
    pair = pair[:, (pair > 0).all(0)]
    factor = float((pair[0] / pair[1]).median()) if pair.numel() else 0.0
    if not 1 / IMPOSSIBLE <= factor <= IMPOSSIBLE:
        raise SphereError(
            f"The second moment in {path} is {factor:.3g} times what this model's keys give on a short text: it is "
            "another model's, another layer's, or no mean; give the right one, or remove it to have it computed.",
            argument="stats_from",
        )
    related = float(spearmanr(*pair.numpy()).statistic)
    if not 1 / UNLIKELY <= factor <= UNLIKELY or not related >= UNRELATED:
        log.warning(
            "The second moment in %s may not be this model's: it is %.3g times what its keys give on a short text, and "
            "the rank correlation of their mean squares is %.2f.",
            path,
            factor,
            related,
        )


def _only_one(found: Sequence[PublishedFile], folder: Path, module: str, hparams: HParams) -> PublishedFile:
    """The file of a module in a folder that was given: the only one, or the only one that fits best."""

    def fit(file: PublishedFile) -> tuple[bool, bool, bool]:
        return (
            file.dataset == hparams.mom2_dataset,
            file.samples == hparams.mom2_n_samples,
            file.dtype == hparams.mom2_dtype,
        )

    best = [file for file in found if fit(file) == max(map(fit, found))]
    if len(best) == 1:
        return best[0]
    reason = f"{len(best)} of them fit alike, the first is {best[0].path}" if best else "it holds none"
    raise SphereError(
        f"There must be one file of second moments of '{module}' in {folder}, as <module>_<dtype>_mom2_<n>.npz, but "
        f"{reason}: give the folder of the right ones.",
        argument="stats_from",
    )


# ---- one file ----


def read_moment(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """E[k k^T] (in x in) of a file: its sum by its count, made exactly symmetric.

    Args:
        size: in.
        dtype: of the result; the division is done in float64.

    Raises:
        SphereError: a file that is damaged, of another shape, or no second moment of any keys.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if missing := sorted({"mom2.mom2", "mom2.count"} - names):
                raise ValueError(f"it has no array {' and '.join(missing)}")
            if "mom2.constructor" in names:
                made_by = str(_small(archive, "mom2.constructor"))
                if "SecondMoment" not in made_by:
                    raise ValueError(f"it was written by {made_by}, not by SecondMoment()")
            count = float(_small(archive, "mom2.count"))
            if not (count >= 1 and count.is_integer()):
                raise ValueError(f"its mom2.count is {count:g}, not a number of tokens")
            moment = torch.empty(size, size, dtype=dtype)
            with archive.open("mom2.mom2.npy") as member:
                for start, rows in _rows(member, size):
                    moment[start : start + len(rows)] = torch.from_numpy(rows).div_(count)
    except (OSError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise SphereError(
            f"The second moment in {path} cannot be used ({reason}): get the file anew, or remove it to have it "
            "computed.",
            argument="stats_from",
        ) from error
    if fault := _fault(moment):
        raise SphereError(
            f"The matrix in {path} is no second moment ({fault}): get the file anew, or remove it to have it computed.",
            argument="stats_from",
        )
    return moment


def _small(archive: zipfile.ZipFile, name: str) -> Any:
    """A scalar among the arrays."""
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False).item()  # type: ignore[arg-type]


def _rows(member: IO[bytes], size: int) -> Iterable[tuple[int, np.ndarray]]:
    """The rows of a (size x size) array, a few at a time in float64; of one in Fortran's order the columns."""
    version = np.lib.format.read_magic(member)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"version {version} of the array format is not known")
    shape, _, kind = header[version](member)
    if shape != (size, size):
        raise ValueError(f"its shape is {shape}, the module's keys have {size} values")
    if kind.kind != "f":
        raise ValueError(f"its values are of type {kind}")
    for start in range(0, size, ROWS):
        n_rows = min(ROWS, size - start)
        data = member.read(n_rows * size * kind.itemsize)
        if len(data) < n_rows * size * kind.itemsize:
            raise EOFError("it ends too early")
        yield start, np.frombuffer(data, kind).reshape(n_rows, size).astype(np.float64)


def _fault(moment: Tensor) -> str | None:
    """Why a matrix is not E[k k^T] of any k, in a few words; None where it may be. Makes it exactly symmetric."""
    diagonal = moment.diagonal().double()  # in
    if not bool(torch.isfinite(diagonal).all()) or bool((diagonal < 0).any()) or not bool(diagonal.any()):
        return "its diagonal is not finite, negative, or zero"
    tiny = float(diagonal.max()) * torch.finfo(moment.dtype).eps
    for start in range(0, len(moment), ROWS):
        chosen = slice(start, start + ROWS)
        rows, columns = moment[chosen].double(), moment[:, chosen].T.double()  # rows x in
        bound = (diagonal[chosen, None] * diagonal).sqrt() + tiny  # of |M_ij|, by Cauchy and Schwarz
        if not bool(((rows - columns).abs() <= ROUNDING * bound).all()):
            return "it is not symmetric, or not finite"
        mean = (rows + columns) / 2
        if not bool((mean.abs() <= (1 + ROUNDING) * bound).all()):
            return "an entry is larger than its diagonal allows"
        moment[chosen] = mean
        moment[:, chosen] = mean.T
    smallest, largest = extreme_eigenvalues(moment)
    if smallest < -NEGATIVE * largest:
        return f"it is not positive semidefinite: eigenvalues from {smallest:.3g} to {largest:.3g}"
    return None
