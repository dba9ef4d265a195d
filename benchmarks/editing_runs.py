"""What the benchmarks that edit the default model share: the flags, the facts in batches, the section of results.

Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.__main__ import kind_of, section, write_section
from benchmarks.common import Comparison, benchmark_parser, device_of
from sphere.commands.common import DATA_FLAGS, add_settings, positive_int
from sphere.data.records import Record, load_records


def editing_parser(doc: str | None, n: int) -> argparse.ArgumentParser:
    """The flags of every benchmark, and what is edited (`n` facts by default) and how; a script adds its own."""
    parser = benchmark_parser(doc, turns=None)
    add_settings(parser, DATA_FLAGS, dataset_size_limit={"default": n})
    parser.add_argument(
        "--n",
        dest="dataset_size_limit",
        type=positive_int,
        default=argparse.SUPPRESS,
        help="short for --dataset_size_limit: edits in all",
    )
    parser.add_argument("--num_edits", type=positive_int, default=20, help="edits per batch")
    parser.add_argument(
        "--steps", type=positive_int, default=None, help="v_num_grad_steps (default: as in editing)"
    )
    parser.add_argument("--stats_dir", default="data/stats", help="where second moments are kept")
    parser.add_argument(
        "--output", type=Path, default=None, help="also write the rows into a section of this file"
    )
    return parser


def batches_of(args: argparse.Namespace) -> list[list[Record]]:
    """The facts, in the order of editing."""
    records = load_records(args.ds_name, args.data_dir, args.dataset_size_limit)
    return [records[i : i + args.num_edits] for i in range(0, len(records), args.num_edits)]


def command_of(script: str, args: argparse.Namespace, own: Sequence[str]) -> str:
    """The command that was run, without what names files and folders.

    Args:
        own: the script's own flags.
    """
    values = vars(args) | {"n": args.dataset_size_limit}
    parts = [f"python -m benchmarks.{script}"]
    for name in ("device", "ds_name", "n", "num_edits", "steps", *own):
        if (value := values[name]) is not None:
            parts.append(f"--{name} {' '.join(value) if isinstance(value, list) else value}")
    return " ".join(parts)


def write_rows(
    args: argparse.Namespace,
    title: str,
    explanation: str,
    command: str,
    rows: Sequence[Comparison],
    seconds: float,
) -> None:
    """Put the rows into a section of the file that --output names, if it names one."""
    if args.output:
        device = device_of(args)
        body = section(command, device, rows, seconds)
        write_section(args.output, f"{title} ({kind_of(device)})", f"{explanation}\n\n{body}")
