"""Batched scoring beside one record at a time: ratio of speeds and largest difference of results.

    python -m benchmarks.scoring --ds_name mcf --data_dir <folder> --dataset_size_limit 64

The plain way is `benchmarks/plain/scoring.py`. Both take turns over chunks of the records, so that a busy machine
slows both alike.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.common import Comparison, finish
from benchmarks.plain.scoring import plain_scorer
from sphere.commands.common import DATA_FLAGS, MODEL_FLAGS, add_settings, make_parser, positive_int, run_cli
from sphere.data.records import Record, load_records
from sphere.errors import SphereError
from sphere.evaluation.scoring import RecordScorer, count_prompts
from sphere.forward.passes import PassOptions
from sphere.models import load_model

GOAL = 2.5


def differences(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> tuple[float, int]:
    """Largest difference of a number, and how many of success and accuracy differ."""
    largest, unequal = 0.0, 0
    for a, b in zip(ours, plain, strict=True):
        for section in ("rewrite", "paraphrase", "neighborhood"):
            for x, y in zip(a[section], b[section], strict=True):
                for key, value in x.items():
                    if isinstance(value, float) and not key.startswith("accuracy"):
                        largest = max(largest, abs(value - y[key]))
                    elif key != "prompt":
                        unequal += value != y[key]
    return largest, unequal


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and fail below the goal or with unequal results."""
    parser = make_parser(__doc__)
    add_settings(parser, (*MODEL_FLAGS, *DATA_FLAGS), dataset_size_limit={"default": 64})
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    parser.add_argument("--chunk", type=positive_int, default=32, help="records per turn")
    parser.add_argument("--batch_tokens", type=positive_int, default=None, help="tokens of one forward pass")
    args = parser.parse_args(argv)
    records = load_records(args.ds_name, args.data_dir, args.dataset_size_limit)
    model, tokenizer = load_model(args.model_name, args.device, args.dtype, args.device_map)
    ours, plain = (
        RecordScorer(model, tokenizer, PassOptions(batch_tokens=args.batch_tokens)),
        plain_scorer(model, tokenizer),
    )
    ours.score(records[:1], progress=False)  # warm up; also the probe of the mask
    plain.score(records[:1], progress=False)
    ours_seconds, plain_seconds, our_cases, plain_cases = 0.0, 0.0, [], []
    for start in range(0, len(records), args.chunk):
        chunk: list[Record] = records[start : start + args.chunk]
        begin = time.perf_counter()
        our_cases += ours.score(chunk, progress=False)
        middle = time.perf_counter()
        for record in chunk:
            plain_cases += plain.score([record], progress=False)
        ours_seconds += middle - begin
        plain_seconds += time.perf_counter() - middle
    prompts = count_prompts(our_cases)
    largest, unequal = differences(our_cases, plain_cases)
    if unequal or largest > 1e-4:
        raise SphereError(
            f"The two ways disagree: {unequal} successes and accuracies differ, NLLs by up to {largest:.1e}."
        )
    row = Comparison(
        "scoring of edits",
        f"{len(records)} records of {args.ds_name}, {prompts} prompts",
        plain_seconds,
        ours_seconds,
        largest,
        goal=GOAL,
        note=f"{prompts / ours_seconds:.0f} prompts/s, plain {prompts / plain_seconds:.0f}; equal successes and "
        "accuracies, the difference is the largest absolute one of an NLL",
    )
    args.device = str(next(model.parameters()).device)  # what "auto" has chosen
    return finish([row], args)


if __name__ == "__main__":
    run_cli(main)
