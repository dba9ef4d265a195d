"""What every benchmark shares: the plain and the fast way taking turns, peak memory, rows of results.

A script makes its inputs, hands two callables to `compare`, and ends with `return finish(rows, args)`. Knows nothing
of what is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sphere.commands.common import make_parser, positive_int
from sphere.errors import SphereError
from sphere.files import write_json

T = TypeVar("T")
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of mallopt (malloc.h)


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        name: what is compared.
        sizes: e.g. "1024 x 4096, float32".
        plain_seconds: of the plain way, median over the turns.
        fast_seconds: of the fast way.
        difference: largest relative difference of the two results (what it is relative to, `note` says); None where
            the row has no result of its own.
        plain_bytes: peak memory above what was held before; None where it cannot be measured.
        fast_bytes: the same of the fast way.
        goal: ratio that the project wants at these sizes, if it set one.
        note: anything else, e.g. tokens/s.
    """

    name: str
    sizes: str
    plain_seconds: float
    fast_seconds: float
    difference: float | None
    plain_bytes: int | None = None
    fast_bytes: int | None = None
    goal: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster the fast way is."""
        return self.plain_seconds / self.fast_seconds


@dataclass(frozen=True)
class Measured:
    """Seconds of each turn, the largest peak extra memory, and the last result."""

    seconds: list[float]
    peak_bytes: int | None
    result: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compare(
    name: str,
    sizes: str,
    plain: Callable[[], T],
    fast: Callable[[], T],
    *,
    difference: Callable[[T, T], float],
    device: str | torch.device = "cpu",
    turns: int = 3,
    warm_plain: bool = True,
    warm_fast: bool = True,
    before: Callable[[], Any] = lambda: None,
    goal: float | None = None,
    note: str | Callable[[Measured], str] = "",
) -> Comparison:
    """Time plain and fast alternately, so that a busy machine slows both alike; before that, measure their memory.

    Args:
        plain: the plain way; called `turns` times, before that once for its memory unless `warm_plain` is false.
        fast: the fast way; called `turns` times, before that twice, once for its memory, unless `warm_fast` is false.
            Both must do the same work whenever they are called.
        difference: (fast result, plain result) -> largest relative difference.
        before: puts things back before each call, unmeasured; for a fast way that moves on.
        note: text, or a function of the fast way's measurements.
    """
    device = torch.device(device)
    ways = (plain, fast)
    if warm_fast:
        before()
        fast()
    peaks: list[int | None] = []
    for way, warm in zip(ways, (warm_plain, warm_fast), strict=True):
        if warm:
            before()
        peaks.append(peak_of(way, device) if warm else None)
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = [None, None]
    for _ in range(turns):
        for index, way in enumerate(ways):
            results[index] = None
            before()
            taken, results[index] = time_of(way, device)
            seconds[index].append(taken)
    kept = [Measured(*parts) for parts in zip(seconds, peaks, results, strict=True)]
    return Comparison(
        name,
        sizes,
        kept[0].median,
        kept[1].median,
        difference(kept[1].result, kept[0].result),
        kept[0].peak_bytes,
        kept[1].peak_bytes,
        goal,
        note(kept[1]) if callable(note) else note,
    )


def time_of(way: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds and the result of one call."""
    gc.collect()
    synchronize(device)
    begin = time.perf_counter()
    result = way()
    synchronize(device)
    return time.perf_counter() - begin, result


def peak_of(way: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one call in bytes, above what was held before, its result included.

    The device's on a GPU; else the peak resident set, while the C library is told to hand freed blocks back at once
    (otherwise its reserve would count). None where the system does not tell.
    """
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    if not reset_peak():
        return None
    held = status_bytes("RssAnon")
    way()
    peak, of_files = (
        status_bytes("VmHWM"),
        status_bytes("RssFile"),
    )  # pages of libraries come and go: they do not count
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 * MIB)  # as large as the library itself lets it grow
    if held is None or peak is None or of_files is None:
        return None
    return max(peak - of_files - held, 0)


def synchronize(device: torch.device) -> None:
    """Wait for the device: its work is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak() -> bool:
    """Count the peak resident set anew, with freed blocks handed back at once; False where the system cannot."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, MIB // 4)
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets the peak resident set (man 5 proc)
    except (OSError, AttributeError):
        return False
    return True


def status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((found.double().to(expected.device) - expected).norm() / expected.norm())


def benchmark_parser(doc: str | None, turns: int | None = 3) -> argparse.ArgumentParser:
    """--device, --turns (unless None) and --json, to which a script adds its sizes."""
    parser = make_parser(doc)
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:<index>; cuda takes the real sizes"
    )
    if turns is not None:
        parser.add_argument("--turns", type=positive_int, default=turns, help="turns that each way takes")
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    return parser


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of --device.

    Raises:
        SphereError: a GPU that is not there.
    """
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise SphereError(f"--device is cpu, cuda or cuda:<index>, got '{args.device}'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SphereError("--device cuda, but torch sees no GPU here: leave it out to measure on the CPU.")
    return device


def finish(rows: Sequence[Comparison], args: argparse.Namespace) -> int:
    """Print the rows, write them where --json says; the exit code is 1 where a goal was missed."""
    print_rows(rows)
    if args.json:
        write_json(args.json, {"machine": machine(device_of(args)), "rows": [asdict(row) for row in rows]})
    return int(any(row.goal is not None and row.ratio < row.goal for row in rows))


def print_rows(rows: Sequence[Comparison]) -> None:
    """The rows as a Markdown table."""
    print(table(rows), flush=True)


HEADER = ("What", "Sizes", "Plain", "Fast", "Ratio", "Goal", "Largest difference", "Extra memory", "Note")


def table(rows: Sequence[Comparison]) -> str:
    """A Markdown table of rows."""
    lines = [
        "| " + " | ".join(HEADER) + " |",
        "|---|---|" + "---:|" * (len(HEADER) - 3) + "---|",
    ]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows])


def _cells(row: Comparison) -> list[str]:
    peaks = (row.plain_bytes, row.fast_bytes)
    shown = ("?" if peak is None else f"{peak / MIB:.0f}" for peak in peaks)
    memory = "not measured" if peaks == (None, None) else f"{' -> '.join(shown)} MiB"
    return [
        row.name,
        row.sizes,
        _seconds(row.plain_seconds),
        _seconds(row.fast_seconds),
        f"{row.ratio:.1f}",
        "" if row.goal is None else f"{row.goal:g}",
        "" if row.difference is None else f"{row.difference:.1e}",
        memory,
        row.note,
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def machine(device: torch.device | None = None) -> dict[str, str]:
    """What the numbers depend on: processor, threads, versions, the GPU where it was used."""
    facts = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def read_rows(path: str | Path) -> tuple[dict[str, str], list[Comparison]]:
    """The machine and the rows that `finish` wrote."""
    content = json.loads(Path(path).read_text("utf-8"))
    return content["machine"], [Comparison(**row) for row in content["rows"]]
