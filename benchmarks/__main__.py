"""Run all benchmarks, each in a process of its own, and write their rows to benchmarks/results.md.

    python -m benchmarks
    python -m benchmarks --device cuda            # the real sizes
    python -m benchmarks --only alphaedit_solve memit_solve

The file holds a section per kind of device; a run replaces its own and keeps the other. It is written anew after every
benchmark, so that a run that is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.common import Comparison, device_of, machine, read_rows, table
from sphere.commands.common import make_parser, run_cli
from sphere.files import atomic_path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.md"
# Scripts, and the flags with which they take minutes.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "principal_directions": (),
    "alphaedit_solve": (),
    "memit_solve": (),
    "keys": (),
    "second_moments": (),
    "target_values": (),
    "scoring": (),
    "end_to_end": ("--n", "10", "--num_edits", "10"),
}
INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks` (`make bench`). Each row is a fast path of `sphere` beside a plain implementation of
the same mathematics in `benchmarks/plain/`, both in one process, taking turns, medians of the turns. "Largest
difference" is relative, of the results; what exactly is compared, each script's docstring says. "Extra memory" is the
peak above what was held before the call. "Goal" is the ratio that the project set itself, where it did. The rows "end
to end" are of ten edits; a section of that name, of more edits, is written by `python -m benchmarks.end_to_end --output
benchmarks/results.md`, the section on growth by `python -m benchmarks.growth --output benchmarks/results.md`.
"""


def run_one(name: str, args: argparse.Namespace, folder: Path) -> tuple[str, list[Comparison]]:
    """One script in a process of its own: what went wrong, if anything, and its rows."""
    path = folder / f"{name}.json"
    flags = (*SCRIPTS[name], "--device", args.device, "--json", str(path))
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    begin = time.perf_counter()
    code = subprocess.run(command, cwd=FOLDER.parent, check=False).returncode
    if not path.exists():
        return f"`{name}` failed with exit code {code}", []
    print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return "", read_rows(path)[1]


def command_of(args: argparse.Namespace) -> str:
    """The command that was run."""
    chosen = "" if args.only is None else f" --only {' '.join(args.only)}"
    return f"python -m benchmarks --device {args.device}{chosen}"


def section(
    command: str,
    device: torch.device,
    rows: Sequence[Comparison],
    seconds: float,
    failures: Sequence[str] = (),
) -> str:
    """The Markdown of what a command has measured on a device."""
    lines = [
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes.",
        "",
        *(f"- {key}: {value}" for key, value in machine(device).items()),
        "",
        table(rows),
    ]
    if failures:
        lines += ["", "Not measured: " + "; ".join(failures) + "."]
    return "\n".join(lines) + "\n"


def write_section(path: Path, title: str, body: str) -> None:
    """Replace one section of the file, keep the others, in the order of their titles."""
    text = path.read_text("utf-8") if path.exists() else ""
    sections = dict(re.findall(r"^## (.+?)\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    sections[title] = body
    parts = [f"## {name}\n\n{sections[name].strip()}\n" for name in sorted(sections)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([INTRODUCTION, *parts]), "utf-8")


def kind_of(device: torch.device) -> str:
    """What a section's title says of the device."""
    return "GPU" if device.type == "cuda" else "CPU"


def main(argv: list[str] | None = None) -> int:
    """Run, print and write; the exit code is 1 where a script failed or a goal was missed."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:<index>; cuda takes the real sizes"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(SCRIPTS), default=None, help="some of the benchmarks"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = device_of(args)
    rows: list[Comparison] = []
    failures: list[str] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(args.only or SCRIPTS, desc="benchmarks"):
            failure, found = run_one(name, args, Path(folder))
            rows += found
            failures += [failure] if failure else []
            body = section(command_of(args), device, rows, time.perf_counter() - begin, failures)
            write_section(args.output, kind_of(device), body)
    print(args.output.read_text("utf-8"))
    missed = [row for row in rows if row.goal and row.ratio < row.goal]
    return int(bool(failures or missed))


if __name__ == "__main__":
    run_cli(main)
