"""Target values z: the batched path beside the plain one, on tiny models."""

from __future__ import annotations

import random
from collections import UserDict
from dataclasses import replace

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, REQUESTS, tiny_gpt2, tiny_hparams, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig

from benchmarks.plain import target_values as plain
from benchmarks.plain.target_values import plain_target_values
from sphere import EditRequest, SphereError
from sphere.forward import stop_check
from sphere.forward.layers import LayerStack, RecordedCalls
from sphere.forward.padding import pack_rows
from sphere.hparams import TargetHParams
from sphere.values import compute_z as compute_z_module
from sphere.values.compute_z import TargetValues, compute_z

TEMPLATES = (("{}",), ("The sun is up. {}", "Therefore it goes. {}"))
FACTS = [
    *REQUESTS,
    EditRequest(3, "{} lives in", "Q", "Ur", "Ys"),  # a subject of one token at the very start
    EditRequest(4, "The house of {}", "Eve", "Oslo town", "Bern"),  # a subject at the end
    EditRequest(5, "What {} speaks, as everybody around here knows, is", "a man", "Dutch", "French"),
]


def tiny_gptj() -> nn.Module:
    """A model whose layers return tuples."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "rotary_dim": 4}
    config = GPTJConfig(**shape, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


GPTJ_MODULES = GPT2_MODULES | {"rewrite_module_tmp": "transformer.h.{}.mlp.fc_out"}
MODELS = {
    "llama": (tiny_llama, LLAMA_MODULES),
    "gpt2": (tiny_gpt2, GPT2_MODULES),
    "gptj": (tiny_gptj, GPTJ_MODULES),
}


@pytest.fixture(params=MODELS)
def model_and_hparams(request) -> tuple[nn.Module, TargetHParams]:
    build, modules = MODELS[request.param]
    return build(), tiny_hparams(modules)


def fast(model, tokenizer, requests, hparams, templates=TEMPLATES, batch_tokens=64) -> TargetValues:
    stack = LayerStack(model, hparams)
    return compute_z(
        stack, tokenizer, requests, templates, hparams, batch_tokens=batch_tokens, progress=False
    )


def assert_alike(found: TargetValues, expected: TargetValues, tolerance: float = 1e-3) -> None:
    assert torch.equal(found.steps, expected.steps)
    for name in ("z", "h0"):
        a, b = getattr(found, name), getattr(expected, name)
        assert ((a - b).norm(dim=1) <= tolerance * b.norm(dim=1)).all(), name
    assert torch.allclose(found.losses, expected.losses, rtol=tolerance, atol=tolerance)


def test_layers_of_the_models_return_what_the_tests_are_about(tiny_tokenizer):
    returned = {}
    for name, (build, modules) in MODELS.items():
        model = build()
        layer = model.get_submodule(modules["layer_module_tmp"].format(0))
        layer.register_forward_hook(lambda _m, _a, output, name=name: returned.update({name: type(output)}))
        model(torch.tensor([[1, 2]]), use_cache=False)
    assert issubclass(returned["llama"], torch.Tensor)
    assert issubclass(returned["gptj"], tuple)


def test_as_one_by_one(model_and_hparams, tiny_tokenizer):
    model, hparams = model_and_hparams
    expected = plain_target_values(model, tiny_tokenizer, FACTS, TEMPLATES, hparams)
    assert (expected.z - expected.h0).norm(dim=1).min() > 0.1
    assert_alike(fast(model, tiny_tokenizer, FACTS, hparams), expected)


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_whatever_the_size_of_micro_batches(tiny_tokenizer, batch_tokens):
    model, hparams = tiny_llama(), tiny_hparams(LLAMA_MODULES)
    expected = plain_target_values(model, tiny_tokenizer, FACTS, TEMPLATES, hparams)
    assert_alike(fast(model, tiny_tokenizer, FACTS, hparams, batch_tokens=batch_tokens), expected)


@pytest.fixture
def easy(monkeypatch) -> tuple[nn.Module, TargetHParams]:
    """A model, steps and a loss that counts as small enough, so that requests are done one after the other."""
    for module in (compute_z_module, plain):
        monkeypatch.setattr(module, "LOSS_TOLERANCE", 6.05)
    return tiny_llama(), tiny_hparams(LLAMA_MODULES, v_num_grad_steps=14, clamp_norm_factor=9.0)


def test_early_stopping(easy, tiny_tokenizer):
    """Requests leave the loop one after the other, each with the z it had when its loss was small."""
    model, hparams = easy
    expected = plain_target_values(model, tiny_tokenizer, FACTS, TEMPLATES, hparams)
    stopped = expected.steps < 14
    assert len(set(expected.steps[stopped].tolist())) > 1
    assert (expected.losses[stopped] < 6.05).all()
    assert_alike(fast(model, tiny_tokenizer, FACTS, hparams), expected)


def test_known_a_step_late(easy, tiny_tokenizer, monkeypatch):
    """As on a GPU: that requests are done is known one step later, and changes nothing."""
    model, hparams = easy
    at_once = fast(model, tiny_tokenizer, FACTS, hparams)
    monkeypatch.setattr(stop_check, "LATE_DEVICES", ("cpu",))
    assert_alike(fast(model, tiny_tokenizer, FACTS, hparams), at_once, 1e-4)


def test_clamp(model_and_hparams, tiny_tokenizer):
    model, hparams = model_and_hparams
    hparams = replace(hparams, clamp_norm_factor=0.3)
    found = fast(model, tiny_tokenizer, FACTS, hparams)
    assert_alike(found, plain_target_values(model, tiny_tokenizer, FACTS, TEMPLATES, hparams))
    ratio = (found.z - found.h0).norm(dim=1) / found.h0.norm(dim=1)
    assert (ratio < 0.3 + 1e-5).all()
    assert (ratio > 0.29).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [0, 1], "v_loss_layer": 2},
        {"kl_factor": 0.0},
        {"kl_factor": 2.0},
        {"v_num_grad_steps": 1},
    ],
)
def test_hyperparameters(tiny_tokenizer, changes):
    """A loss below the top; no KL term and a strong one; no update at all."""
    model, hparams = tiny_llama(), tiny_hparams(LLAMA_MODULES, **changes)
    expected = plain_target_values(model, tiny_tokenizer, FACTS, TEMPLATES, hparams)
    assert_alike(fast(model, tiny_tokenizer, FACTS, hparams), expected)


@pytest.mark.parametrize("changes", [{"layers": [1, 3]}, {"v_loss_layer": 2}])
def test_no_layer_above_z(tiny_tokenizer, changes):
    """Where the target's likelihood is read right at z, only a subject at the prompt's end has a gradient of it."""
    model, hparams = tiny_llama(), tiny_hparams(LLAMA_MODULES, **changes)
    expected = plain_target_values(model, tiny_tokenizer, FACTS[4:5], TEMPLATES, hparams)
    assert_alike(fast(model, tiny_tokenizer, FACTS[4:5], hparams), expected)


def test_no_prefix_at_all(model_and_hparams, tiny_tokenizer):
    """Every lookup token comes first: there is nothing to keep keys and values of."""
    model, hparams = model_and_hparams
    facts = [EditRequest(i, "{} is a", s, "king", "cat") for i, s in enumerate("XYZ")]
    expected = plain_target_values(model, tiny_tokenizer, facts, (("{}",),), hparams)
    assert_alike(fast(model, tiny_tokenizer, facts, hparams, (("{}",),)), expected)


def test_a_request_does_not_depend_on_its_batch(model_and_hparams, tiny_tokenizer):
    model, hparams = model_and_hparams
    together = fast(model, tiny_tokenizer, FACTS, hparams)
    draw = random.Random(0)
    for _ in range(4):
        chosen = draw.sample(range(len(FACTS)), draw.randint(1, len(FACTS) - 1))
        found = fast(model, tiny_tokenizer, [FACTS[i] for i in chosen], hparams)
        expected = TargetValues(
            *(t[chosen] for t in (together.z, together.h0, together.losses, together.steps))
        )
        assert_alike(found, expected)


def test_bfloat16_keeps_its_state_in_float32(tiny_tokenizer):
    model, hparams = tiny_llama(), tiny_hparams(LLAMA_MODULES)
    exact = fast(model, tiny_tokenizer, FACTS, hparams)
    found = fast(model.bfloat16(), tiny_tokenizer, FACTS, hparams)
    assert found.z.dtype == found.h0.dtype == torch.float32
    cosine = torch.cosine_similarity(found.z - found.h0, exact.z - exact.h0, dim=1)
    assert (cosine > 0.9).all()
    assert (found.losses < exact.losses + 0.5).all()


def test_layers_above_z_are_called_for_the_record_and_not_computed(model_and_hparams):
    """Their calls and the result are those of layers that compute; afterwards they compute as before."""
    model, hparams = model_and_hparams
    stack, inputs = (
        LayerStack(model, hparams),
        {"input_ids": torch.tensor([[5, 9, 7, 3]]), "use_cache": False},
    )
    computed = []
    for layer in range(4):
        mlp = model.get_submodule(hparams.mlp_module_tmp.format(layer))
        mlp.register_forward_hook(lambda *_, layer=layer: computed.append(layer))
    with torch.no_grad():
        recorded = stack.record(inputs, 1, 3)
        assert computed == [0]
        assert sorted(recorded.calls) == [1, 2, 3]
        found = stack.logits(stack.run(recorded, recorded.hidden, 1, 3))
        computed.clear()
        assert torch.allclose(found, model(**inputs).logits, atol=1e-5)
        assert computed == [0, 1, 2, 3]


def test_a_layer_with_a_forward_of_its_own_keeps_it(model_and_hparams):
    """As layers on several devices have one, which moves what enters them; also where the pass fails."""
    model, hparams = model_and_hparams
    stack, inputs = (
        LayerStack(model, hparams),
        {"input_ids": torch.tensor([[5, 9, 7, 3]]), "use_cache": False},
    )
    layer, calls = stack.layers[2], []
    original = layer.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = forward
    with torch.no_grad():
        stack.record(inputs, 1, 3)
        with pytest.raises(IndexError):
            stack.record({**inputs, "input_ids": torch.tensor([[300]])}, 1, 3)
        assert not calls
        model(**inputs)
    assert layer.forward is forward
    assert calls == [1]


def test_top_mlp_only_where_it_is_scored(tiny_tokenizer):
    """The modules see suffixes only, the top layer's MLP and the head fewer positions still."""
    model, hparams = tiny_llama(), tiny_hparams(LLAMA_MODULES, v_num_grad_steps=1)
    seen: dict[str, int] = {}
    for name in ("model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj", "lm_head"):
        module = model.get_submodule(name)

        def count(_module, args, name=name):
            seen[name] = seen.get(name, 0) + args[0].numel() // args[0].shape[-1]

        module.register_forward_pre_hook(count)
    fact = REQUESTS[0]  # 3 prompts of " is Welsh" behind the lookup token; 6 of its letters are scored
    stack = LayerStack(model, hparams)
    compute_z(
        stack, tiny_tokenizer, [fact], TEMPLATES, hparams, progress=False
    )  # asks the model what it can do
    seen.clear()
    compute_z(stack, tiny_tokenizer, [fact], TEMPLATES, hparams, progress=False)
    prefix_pass = seen["model.layers.3.mlp.up_proj"] - (3 * 6 + 1)
    assert seen["lm_head"] == 3 * 6 + 1
    assert prefix_pass < seen["model.layers.2.mlp.up_proj"]


def test_templates_without_the_bare_prompt(tiny_tokenizer):
    with pytest.raises(SphereError, match="bare"):
        fast(tiny_llama(), tiny_tokenizer, FACTS, tiny_hparams(LLAMA_MODULES), (("So. {}",),))


def test_a_broken_model_is_named(tiny_tokenizer):
    model, hparams = tiny_llama(), tiny_hparams(LLAMA_MODULES)
    model.get_parameter("model.layers.3.mlp.down_proj.weight").fill_(float("nan"))
    with pytest.raises(SphereError, match=r"not finite at step 1 for case\(s\) \[0, 1"):
        fast(model, tiny_tokenizer, FACTS, hparams)


def test_requests_that_are_done_are_no_longer_computed(easy, tiny_tokenizer):
    """What stays is laid out anew, in packed rows, and keeps the distribution that KL is taken from."""
    model, hparams = easy
    stack, positions = LayerStack(model, hparams), []
    stack.takes_trees(range(64))  # asks the model, once

    def count(_module, args):
        positions.append(tuple(args[0].shape[:2]))

    model.get_submodule("model.layers.3").register_forward_pre_hook(count)
    found = fast(model, tiny_tokenizer, FACTS, hparams, batch_tokens=10_000)
    steps = positions[-int(found.steps.max()) :]  # one micro-batch each
    sizes = [rows * columns for rows, columns in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert steps[0][0] < len(FACTS) * 3  # prompts share rows
    assert_alike(found, plain_target_values(model, tiny_tokenizer, FACTS, TEMPLATES, hparams))


def test_a_model_that_does_not_heed_masks(model_and_hparams, tiny_tokenizer, monkeypatch):
    """Each row gets a line of its own."""
    model, hparams = model_and_hparams
    expected = fast(model, tiny_tokenizer, FACTS, hparams)
    monkeypatch.setattr(LayerStack, "takes_trees", lambda *_: False)
    assert_alike(fast(model, tiny_tokenizer, FACTS, hparams), expected, 1e-4)


def test_matmul_dtype_bfloat16(model_and_hparams, tiny_tokenizer):
    """z moves by what rounding makes of it, h0 not at all, and the model is left as it was."""
    model, hparams = model_and_hparams
    stack = LayerStack(model, hparams)
    exact, lower = (
        compute_z(stack, tiny_tokenizer, FACTS, TEMPLATES, hparams, matmul_dtype=matmul_dtype, progress=False)
        for matmul_dtype in (None, torch.bfloat16)
    )
    assert torch.equal(lower.h0, exact.h0)
    delta, its = exact.z - exact.h0, lower.z - lower.h0
    assert 1e-5 < (delta - its).norm() / delta.norm() < 0.2
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(
        fast(model, tiny_tokenizer, FACTS, hparams).z, fast(model, tiny_tokenizer, FACTS, hparams).z
    )


@pytest.mark.parametrize("budget", [1, 7, 40, 1000])
def test_packed_rows(budget):
    """Each row once, groups within the budget, little left empty."""
    pick = random.Random(budget)
    for count in (0, 1, 2, 30, 90):
        lengths = [pick.randint(1, 12) for _ in range(count)]
        groups = pack_rows(lengths, budget)
        assert sorted(i for group in groups for line in group for i in line) == list(range(count))
        padded = 0
        for group in groups:
            filled = [sum(lengths[i] for i in line) for line in group]
            assert len(group) == 1 or max(filled) * len(group) <= budget
            padded += max(filled) * len(group)
        if budget == 1000 and count == 90:
            assert padded <= 1.05 * sum(lengths)


def test_recorded_calls_of_some_rows():
    """Also of keys and values that layers hand to one another in a mapping of their own, which stays one."""
    mask, own = torch.arange(6.0).reshape(3, 2), torch.ones(2)
    shared = UserDict({"full": (mask + 1, mask + 2)})
    calls = {layer: ((mask, own), {"shared": shared, "n": 3}) for layer in (0, 1)}
    rows = torch.tensor([2, 0])
    found = RecordedCalls(torch.zeros(3, 4, 5), 0, calls).select(rows)
    assert found.hidden.shape == (2, 4, 5)
    for args, kwargs in found.calls.values():
        assert torch.equal(args[0], mask[rows])
        assert args[1] is own
        assert torch.equal(kwargs["shared"]["full"][1], mask[rows] + 2)
        assert kwargs["n"] == 3
    assert found.calls[0][1]["shared"] is found.calls[1][1]["shared"]
    assert isinstance(found.calls[0][1]["shared"], UserDict)
