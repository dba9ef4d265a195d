"""Second moments of all edited layers in one batched pass, beside one pass per layer, one document at a time.

    python -m benchmarks.second_moments
    python -m benchmarks.second_moments --device cuda     # random Qwen2.5-7B

The documents are random token ids of 20 to 120 tokens. Both ways stop where the last keys are, multiply in float32 and
add up in float64. The difference is the largest of the layers' E[k k^T] (in x in).
"""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor

from benchmarks.common import Comparison, Measured, benchmark_parser, compare, device_of, finish, relative
from benchmarks.models import benchmark_model
from benchmarks.plain import moments as plain
from sphere.commands.common import positive_int, run_cli
from sphere.forward.layers import LayerStack
from sphere.values.layer_stats import layer_stats

SHORTEST, LONGEST = 20, 120


def random_documents(n: int, vocabulary: int) -> list[list[int]]:
    """Token ids of documents of different lengths."""
    chosen = random.Random(0)
    return [
        [chosen.randrange(vocabulary) for _ in range(chosen.randint(SHORTEST, LONGEST))] for _ in range(n)
    ]


def measure(model: Any, hparams: Any, n_documents: int, batch_tokens: int, turns: int) -> Comparison:
    """One row."""
    stack = LayerStack(model, hparams)
    documents = random_documents(n_documents, model.config.vocab_size)
    tokens = sum(map(len, documents))

    def by_plain() -> list[Tensor]:
        return [plain.second_moment(model, module, documents) for module in stack.rewrite.values()]

    def fast() -> list[Tensor]:
        return list(layer_stats(stack, documents, batch_tokens=batch_tokens)[0].values())

    def note(fast: Measured) -> str:
        return f"{tokens / fast.median:.0f} tokens/s"

    width = next(iter(stack.rewrite.values())).weight
    return compare(
        f"second moments of layers {', '.join(map(str, stack.rewrite))}",
        f"in {max(width.shape)}, {n_documents} documents, {tokens} tokens",
        by_plain,
        fast,
        difference=lambda a, b: max(relative(x, y) for x, y in zip(a, b, strict=True)),
        device=stack.device,
        turns=turns,
        goal=3,
        note=note,
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__, turns=2)
    parser.add_argument("--documents", type=positive_int, default=None)
    parser.add_argument("--batch_tokens", type=positive_int, default=4096)
    args = parser.parse_args(argv)
    device = device_of(args)
    model, _, hparams = benchmark_model(device)
    n_documents = args.documents or (400 if device.type == "cuda" else 60)
    return finish([measure(model, hparams, n_documents, args.batch_tokens, args.turns)], args)


if __name__ == "__main__":
    run_cli(main)
