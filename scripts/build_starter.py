"""Build data/starter.json, the embedded dataset, from a plain table of facts.

Every record is a counterfactual edit of a fact that the model gets right before the edit. The same facts,
model, seed and machine give the same file. The format of the facts table is described in data/README.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

from sphere.data.starter import StarterConfig, TargetScorer, build_starter, load_facts
from sphere.errors import SphereError
from sphere.files import write_json
from sphere.forward.passes import PassOptions
from sphere.models import DEFAULT_MODEL, load_model


def parser() -> argparse.ArgumentParser:
    defaults = StarterConfig()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--facts", type=Path, default=Path("data/starter_facts.json"), help="table of facts (%(default)s)"
    )
    p.add_argument(
        "--out", type=Path, default=Path("data/starter.json"), help="dataset to write (%(default)s)"
    )
    p.add_argument("--model", default=DEFAULT_MODEL, help="model that must know the facts (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    p.add_argument("--seed", type=int, default=defaults.seed, help="of every choice (%(default)s)")
    p.add_argument("--batch_tokens", type=int, default=None, help="tokens in one forward pass (by device)")
    p.add_argument(
        "--per_relation",
        type=int,
        default=defaults.per_relation,
        help="most records of a relation (%(default)s)",
    )
    p.add_argument(
        "--margin",
        type=float,
        default=defaults.margin,
        help="nats per token by which the true target must beat the new one before the edit (%(default)s)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        relations = load_facts(args.facts)
        passes = PassOptions(batch_tokens=args.batch_tokens)
        scorer = TargetScorer(*load_model(args.model, device=args.device), passes)
        config = StarterConfig(seed=args.seed, per_relation=args.per_relation, margin=args.margin)
        records = build_starter(relations, scorer, config)
        write_json(args.out, records)
    except SphereError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = Counter(record["requested_rewrite"]["relation_id"] for record in records)
    print(f"{len(records)} records over {len(counts)} relations: {args.out}")
    print(", ".join(f"{relation} {n}" for relation, n in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
