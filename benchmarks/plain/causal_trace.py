"""Causal tracing the plain way: one fact, one draw and one layer at a time, the whole model each time.

As in the published code of ROME: a hook on the embeddings adds the noise, a hook on one layer puts the clean hidden
state back at the subject's last token. Where subject and answer lie is found by `benchmarks.plain.tokens`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.plain.tokens import to_subject, with_target
from sphere.requests import EditRequest


@torch.no_grad()
def plain_causal_trace(
    model: Any, tokenizer: Any, request: EditRequest, noise: Tensor, layer_tmp: str
) -> tuple[float, list[float], list[list[float]]]:
    """Trace the first token of a request's new target.

    Args:
        noise: (draws x subject tokens x d), for the tokens up to the subject's last one.
        layer_tmp: path of a layer, with `{}` for its number.

    Returns:
        P[o]; P*[o] by draw; P*_l[o] by draw and layer.
    """
    text, up_to_subject = to_subject(tokenizer, "{}", request)
    ids, start = with_target(tokenizer, text, request.target_new)
    prompt, answer, lookup = torch.tensor([ids[:start]]), ids[start], len(up_to_subject) - 1
    layers = range(model.config.num_hidden_layers)
    clean_states: dict[int, Tensor] = {}

    def run(added: Tensor | None, restored: int | None) -> float:
        handles = []

        def corrupt(_module: Any, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, lookup + 1 - len(added) : lookup + 1] += added
            return output

        def keep(layer: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                clean_states[layer] = hidden[0, lookup].clone()

            return hook

        def put_back(_module: Any, _args: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, Tensor) else output[0]).clone()
            hidden[0, lookup] = clean_states[restored]
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        if added is None:
            handles += [
                model.get_submodule(layer_tmp.format(n)).register_forward_hook(keep(n)) for n in layers
            ]
        else:
            handles.append(model.get_input_embeddings().register_forward_hook(corrupt))
        if restored is not None:
            layer = model.get_submodule(layer_tmp.format(restored))
            handles.append(layer.register_forward_hook(put_back))
        try:
            return float(model(input_ids=prompt, use_cache=False).logits[0, -1].softmax(-1)[answer])
        finally:
            for handle in handles:
                handle.remove()

    clean = run(None, None)
    corrupted = [run(draw, None) for draw in noise]
    return clean, corrupted, [[run(draw, layer) for layer in layers] for draw in noise]
