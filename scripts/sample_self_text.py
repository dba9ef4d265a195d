"""Sample the text that a model writes itself (mom2_dataset "self"), and write it as a file that is found again.

    python -m scripts.sample_self_text --model SmolLM2-135M --out data/self_text/SmolLM2-135M.safetensors

Files in data/self_text/ are used in place of sampling wherever model, tokenizer, seed and lengths are the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from sphere.errors import SphereError
from sphere.fingerprint import fingerprint
from sphere.models import DEFAULT_MODEL, load_model
from sphere.values.self_text import N_TOKENS, sample_documents, sampling_key, write_documents


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=DEFAULT_MODEL, help="name, folder or hub id (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    p.add_argument("--documents", type=int, default=400, help="mom2_n_samples (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="the seed of the runs (%(default)s)")
    p.add_argument("--out", type=Path, required=True, help="file to write")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        model, tokenizer = load_model(args.model, args.device)
        key = sampling_key(fingerprint(model), tokenizer, args.seed, N_TOKENS)
        documents = sample_documents(model, tokenizer, args.documents, N_TOKENS, args.seed)
        write_documents(args.out, documents, key)
    except SphereError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(documents)} documents of {N_TOKENS} tokens: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
