"""Keys and outputs in packed prefix trees: equal to a full forward pass per request and template."""

from __future__ import annotations

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, REQUESTS, tiny_gpt2, tiny_hparams, tiny_llama

from benchmarks.plain import keys as plain
from sphere import EditRequest
from sphere.forward.layers import LayerStack
from sphere.values.compute_ks import ActivationsPass, ids_to_subject

TEMPLATES = (("{}",), ("Then it rained. {}", "Then it poured. {}", "I. {}", "So they say that. {}"))
MODELS = {"llama": (tiny_llama, LLAMA_MODULES), "gpt2": (tiny_gpt2, GPT2_MODULES)}


@pytest.fixture(params=list(MODELS))
def stack(request) -> LayerStack:
    make, modules = MODELS[request.param]
    return LayerStack(make(), tiny_hparams(modules, layers=[1, 2, 3]))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 1e-5 * expected.norm())


def check_layers(stack: LayerStack, tokenizer, requests, budget: int = 2048) -> None:
    """Keys and outputs of each layer, on weights that change as the activations goes up."""
    activations = ActivationsPass(stack, tokenizer, requests, TEMPLATES, budget)
    for layer in stack.hparams.layers:
        expected = plain.keys(stack.model, tokenizer, stack.rewrite[layer], requests, TEMPLATES)
        assert close(activations.compute_ks(layer), expected)
        for above in range(layer, 4):
            if above <= max(stack.hparams.layers):
                wanted = plain.outputs(stack.model, tokenizer, stack.layers[above], requests)
                assert close(activations.outputs(above), wanted)
        with torch.no_grad():
            weight = stack.rewrite[layer].weight
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))


def test_equals_full_forward_passes_while_layers_are_edited(stack, tiny_tokenizer):
    check_layers(stack, tiny_tokenizer, REQUESTS)
    assert stack.takes_trees([1])  # what was tested is the packed way


def test_a_restarted_pass_sees_the_weights_of_now(stack, tiny_tokenizer):
    activations = ActivationsPass(stack, tiny_tokenizer, REQUESTS, TEMPLATES, 2048)
    for layer in stack.hparams.layers:
        activations.compute_ks(layer)
        with torch.no_grad():
            stack.rewrite[layer].weight.mul_(1.1)
    fresh, again = ActivationsPass(stack, tiny_tokenizer, REQUESTS, TEMPLATES, 2048), activations.restart()
    for layer in stack.hparams.layers:
        assert torch.equal(again.compute_ks(layer), fresh.compute_ks(layer))


def test_small_passes_give_the_same(stack, tiny_tokenizer):
    check_layers(stack, tiny_tokenizer, REQUESTS, budget=40)


def test_a_model_without_tree_masks_runs_each_sequence_alone(stack, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(stack, "takes_trees", lambda _: False)
    check_layers(stack, tiny_tokenizer, REQUESTS)


def test_requests_may_share_prompt_and_subject(stack, tiny_tokenizer):
    twins = [*REQUESTS, EditRequest(9, REQUESTS[0].prompt, REQUESTS[0].subject, "French")]
    check_layers(stack, tiny_tokenizer, twins)


def test_a_single_token_subject_at_the_beginning(stack, tiny_tokenizer):
    """With one template there is nothing but one sequence of one token, the probe for tree masks included."""
    fact = EditRequest(0, "{} is", "X", "red")
    check_layers(stack, tiny_tokenizer, [fact])
    activations = ActivationsPass(stack, tiny_tokenizer, [fact], (("{}",),), 2048)
    expected = plain.keys(stack.model, tiny_tokenizer, stack.rewrite[1], [fact], (("{}",),))
    assert close(activations.compute_ks(1), expected)


def test_no_token_is_run_twice_that_several_sequences_begin_with(stack, tiny_tokenizer):
    """The columns that are computed are as many as the prefix trees have nodes, plus padding."""
    stack.takes_trees(range(64))  # asks the model, once
    positions: list[int] = []
    stack.layers[0].register_forward_pre_hook(lambda _m, args: positions.append(args[0].shape[:2].numel()))
    ActivationsPass(stack, tiny_tokenizer, REQUESTS, TEMPLATES, 2048)
    computed = sum(positions)
    rows = {ids_to_subject(tiny_tokenizer, t, r) for group in TEMPLATES for t in group for r in REQUESTS}
    bare = {ids_to_subject(tiny_tokenizer, "{}", r) for r in REQUESTS}

    def nodes(sequences) -> int:
        return len({ids[:end] for ids in sequences for end in range(1, len(ids) + 1)})

    assert nodes(rows) < computed <= 1.5 * (nodes(bare) + nodes(rows - bare))
    assert computed < sum(map(len, rows))


def test_a_pass_leaves_no_hook_and_no_gradient(stack, tiny_tokenizer):
    activations = ActivationsPass(stack, tiny_tokenizer, REQUESTS, TEMPLATES, 2048)
    assert not activations.compute_ks(1).requires_grad
    assert not activations.outputs(3).requires_grad
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in stack.model.modules())


def test_half_precision_keys_are_averaged_in_float32(tiny_tokenizer):
    stack = LayerStack(tiny_llama().bfloat16(), tiny_hparams(LLAMA_MODULES))
    activations = ActivationsPass(stack, tiny_tokenizer, REQUESTS, TEMPLATES, 2048)
    expected = plain.keys(stack.model, tiny_tokenizer, stack.rewrite[1], REQUESTS, TEMPLATES)
    assert activations.compute_ks(1).dtype == torch.float32
    assert (activations.compute_ks(1) - expected).norm() < 2e-2 * expected.norm()
