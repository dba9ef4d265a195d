"""Keys and residuals of a batch in packed prefix trees, beside a full forward pass per request, template and layer.

    python -m benchmarks.keys
    python -m benchmarks.keys --device cuda     # random Qwen2.5-7B

For each edited layer in turn: the keys K, and the output of the last edited layer that the residual is taken from; the
weights of a layer change before the next one, as in an edit. The difference is the largest of a layer's, relative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Comparison, benchmark_parser, compare, device_of, finish, relative
from benchmarks.models import benchmark_model
from benchmarks.plain import keys as plain
from sphere.commands.common import positive_int, run_cli
from sphere.data.records import load_records
from sphere.forward.layers import LayerStack
from sphere.values.compute_ks import ActivationsPass

TEMPLATES = (
    ("{}",),
    (
        "The first thing that you should know about the. {}",
        "Therefore, it is important to be aware of the. {}",
        "Because of this, the number of people in the. {}",
        "I have been a fan of this show since the. {}",
        "You can also use the following steps to get the. {}",
    ),
)


def measure(model: Any, tokenizer: Any, hparams: Any, n: int, batch_tokens: int, turns: int) -> Comparison:
    """One row."""
    stack = LayerStack(model, hparams)
    requests = [record.request for record in load_records("starter", "data", n)]
    top = max(hparams.layers)
    weights = {layer: module.weight for layer, module in stack.rewrite.items()}
    original = {layer: weight.clone() for layer, weight in weights.items()}

    def edit(layer: int) -> None:
        with torch.no_grad():
            weights[layer] *= 1.01

    def restore() -> None:
        for layer, weight in weights.items():
            weight.copy_(original[layer])

    def by_plain() -> list[Tensor]:
        found = []
        for layer, module in stack.rewrite.items():
            found.append(plain.keys(model, tokenizer, module, requests, TEMPLATES))
            found.append(plain.outputs(model, tokenizer, stack.layers[top], requests))
            edit(layer)
        return found

    def fast() -> list[Tensor]:
        activations, found = ActivationsPass(stack, tokenizer, requests, TEMPLATES, batch_tokens), []
        for layer in stack.rewrite:
            found += [activations.compute_ks(layer), activations.outputs(top)]
            edit(layer)
        return found

    row = compare(
        "keys and outputs of a batch",
        f"{len(stack.rewrite)} layers, {n} requests in {sum(map(len, TEMPLATES))} templates",
        by_plain,
        fast,
        difference=lambda a, b: max(relative(x, y) for x, y in zip(a, b, strict=True)),
        device=stack.device,
        turns=turns,
        warm_plain=n <= 8,
        before=restore,
    )
    restore()
    return row


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = benchmark_parser(__doc__, turns=1)
    parser.add_argument("--n", type=positive_int, nargs="+", default=None, help="requests of a batch")
    parser.add_argument("--batch_tokens", type=positive_int, default=2048)
    args = parser.parse_args(argv)
    device = device_of(args)
    model, tokenizer, hparams = benchmark_model(device)
    counts = args.n or ([100] if device.type == "cuda" else [4, 20])
    rows = [measure(model, tokenizer, hparams, n, args.batch_tokens, args.turns) for n in counts]
    return finish(rows, args)


if __name__ == "__main__":
    run_cli(main)
