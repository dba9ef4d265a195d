"""Parts of models of many architectures, run as their own forward runs them: logits, target values z, scores, edits."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from families import FAMILIES
from test_architectures import REQUESTS, WORDS, tiny_editor, tiny_model, tiny_tokenizer

from benchmarks.plain import keys as plain_keys
from benchmarks.plain import moments as plain_moments
from benchmarks.plain.scoring import PlainScorer
from benchmarks.plain.target_values import plain_target_values
from sphere.errors import SphereError
from sphere.forward.head import logits_of
from sphere.forward.layers import LayerStack
from sphere.forward.packing import Scored
from sphere.forward.scorer import PackedScorer
from sphere.methods.teacher_forcing import TeacherForcing
from sphere.values.compute_ks import ActivationsPass
from sphere.values.compute_z import compute_z
from sphere.values.layer_stats import layer_stats
from sphere.values.tokenization import encode_pair

LONG = " ".join(WORDS[i % len(WORDS)] for i in range(0, 75, 3))  # 25 tokens
TEMPLATES = (("{}",), (f"{LONG} {{}}", "tennis golf because {}"))


@torch.no_grad()
def top_and_logits(stack: LayerStack, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the last layer (1 x length x d), and the model's own logits (1 x length x vocabulary)."""
    inputs = {"input_ids": torch.tensor([ids]), "use_cache": False}
    return stack.record(inputs, stack.n_layers, stack.n_layers - 1).hidden, stack.model(**inputs).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_models_own(name):
    """Bit for bit, what it does behind its head (scaling, capping) included."""
    model = FAMILIES[name].model()
    stack = LayerStack(model, FAMILIES[name].hparams("FT"))
    hidden, expected = top_and_logits(stack, [3, 4, 5, 6])
    with torch.no_grad():
        assert torch.equal(stack.logits(hidden), expected)
        torch.testing.assert_close(stack.logits(hidden[0, 2]), expected[0, 2])
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2-tied-name", "llama-tied-name"])
def test_where_nothing_stands_behind_the_head_its_bits_are_the_logits(name):
    family = FAMILIES[name]
    stack = LayerStack(family.model(), family.hparams("FT"))
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    found, expected = stack.logits(hidden), stack.lm_head(stack.ln_f(hidden))
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(x.logsumexp(-1).sum(), hidden)[0] for x in (found, expected)]
    assert torch.equal(*gradients)


def test_a_gradient_goes_through_a_cap():
    family = FAMILIES["gemma2"]
    stack = LayerStack(family.model(), family.hparams("FT"))
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    capped = 5.0 * torch.tanh(stack.lm_head(stack.ln_f(hidden)) / 5.0)
    gradients = [
        torch.autograd.grad(x.logsumexp(-1).sum(), hidden)[0] for x in (stack.logits(hidden), capped)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["gpt2-tied-name", "llama-tied-name"])
def test_a_head_may_be_named_by_the_embedding_that_it_is_tied_to(name):
    """As the files of ROME and MEMIT do."""
    model, hparams = FAMILIES[name].model(), FAMILIES[name].hparams("MEMIT")
    assert LayerStack(model, hparams).lm_head is model.get_output_embeddings()
    config = FAMILIES["mistral"].config  # whose head has a weight of its own
    with pytest.raises(SphereError, match="is not the head"):
        LayerStack(tiny_model(config), FAMILIES["llama-tied-name"].hparams("MEMIT"))


def test_a_module_that_is_not_the_final_norm():
    hparams = dataclasses.replace(
        FAMILIES["mistral"].hparams("FT"), ln_f_module="model.layers.2.input_layernorm"
    )
    model = FAMILIES["mistral"].model()
    with torch.no_grad():
        model.model.norm.weight.normal_()
    with pytest.raises(SphereError, match=r"do not give its logits .* ln_f_module"):
        LayerStack(model, hparams)


def test_a_model_without_a_decoder_to_stand_in_for():
    model = FAMILIES["mistral"].model()
    with pytest.raises(SphereError, match="does not make its logits"):
        logits_of(model, [], torch.zeros(2, 16))


BELOW = {"v_loss_layer": 1}  # where the target's likelihood is read below the top layer


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in FAMILIES] + [(name, BELOW) for name in ("bloom", "opt", "cohere2", "gemma2")],
)
def test_target_values_are_those_of_the_plain_way(name, changes):
    """z and losses; a context is longer than the window of those that have one.

    Behind a norm the steps keep z within reach, which the plain way knows nothing of: there the first is compared.
    """
    family = FAMILIES[name]
    model = family.model().requires_grad_(False)
    steps = 1 if family.norm_behind_mlp else 3
    hparams = family.hparams("MEMIT", v_num_grad_steps=steps, kl_factor=0.5, **changes)
    stack, tokenizer = LayerStack(model, hparams), tiny_tokenizer()
    found = compute_z(stack, tokenizer, REQUESTS, TEMPLATES, hparams, batch_tokens=200, progress=False)
    expected = plain_target_values(model, tokenizer, REQUESTS, TEMPLATES, hparams)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.z, expected.z, rtol=1e-3, atol=1e-4)


def branching() -> list[Scored]:
    """Sequences of 3 to 30 tokens that share beginnings of up to 20."""
    draw = random.Random(0)
    root = [draw.randrange(len(WORDS)) for _ in range(20)]
    cuts = [(20, 10), (20, 4), (20, 9), (0, 3), (0, 30), (10, 12), (3, 5)]
    rows = [
        (shared, root[:shared] + [draw.randrange(len(WORDS)) for _ in range(own)]) for shared, own in cuts
    ]
    return [Scored(tuple(ids), max(shared, 1)) for shared, ids in rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_scores_are_those_of_each_sequence_alone(name):
    """Beyond the window, too; and rows are packed wherever a model's attention takes a mask."""
    model, sequences = FAMILIES[name].model(), branching()
    scorer = PackedScorer(model)
    for some in (sequences[3:4], sequences):  # those beyond the window come later
        found, expected = scorer.score(some), PlainScorer(model).score(some)
        for scored in some:
            assert found[scored].nll == pytest.approx(expected[scored].nll, abs=1e-4)
            assert found[scored].predicted.tolist() == expected[scored].predicted.tolist()
    assert scorer.trees is FAMILIES[name].tree_masks


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_those_of_each_prompt_alone(name):
    """Of short requests first, then in contexts that reach beyond the window."""
    family, tokenizer = FAMILIES[name], tiny_tokenizer()
    stack = LayerStack(family.model(), family.hparams("MEMIT"))
    for templates in ((("{}",),), TEMPLATES):
        found = ActivationsPass(stack, tokenizer, REQUESTS, templates, batch_tokens=200)
        for layer, module in stack.rewrite.items():
            expected = plain_keys.keys(stack.model, tokenizer, module, REQUESTS, templates)
            torch.testing.assert_close(found.compute_ks(layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied-name", "opt", "bloom", "qwen2-moe"])
def test_second_moments_are_those_of_each_document_alone(name):
    """Edited modules that are given tokens one below the other, without rows, among them."""
    stack = LayerStack(FAMILIES[name].model(), FAMILIES[name].hparams("MEMIT"))
    documents = [list(scored.ids) for scored in branching()]
    found, tokens = layer_stats(stack, documents, batch_tokens=64)
    assert tokens == sum(map(len, documents))
    for layer, module in stack.rewrite.items():
        expected = plain_moments.second_moment(stack.model, module, documents)
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_on_is_what_is_scored(name):
    """The likelihood that FT and MEND take gradients of, beside the model's own logits."""
    family, tokenizer = FAMILIES[name], tiny_tokenizer()
    stack = LayerStack(family.model(), family.hparams("FT"))
    pairs = [(f"{LONG} {r.text}", r.target_new) for r in REQUESTS]
    sequences = [
        Scored(tuple(ids), start) for ids, start in (encode_pair(tokenizer, *pair) for pair in pairs)
    ]
    plain = PlainScorer(stack.model).score(sequences)
    with torch.no_grad():
        found = TeacherForcing.of(stack, tokenizer, pairs).nll()
    assert found.tolist() == pytest.approx([float(np.mean(plain[s].nll)) for s in sequences], abs=1e-4)


ASKED = [dataclasses.replace(r, prompt=f"{LONG} {r.prompt}") for r in REQUESTS]
METHODS = ("AlphaEdit", "MEMIT", "ROME", "FT")


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in FAMILIES for method in METHODS] + [("opt", "MEND"), ("qwen2-moe", "MEND")],
)
def test_edits(name, method, tmp_path):
    """Prompts longer than any window: targets become more likely, and reverting brings every bit back."""
    family, tokenizer = FAMILIES[name], tiny_tokenizer()
    model, hparams = family.model(), family.hparams(method)
    if hasattr(hparams, "v_num_grad_steps"):
        hparams = dataclasses.replace(hparams, v_num_grad_steps=8)
    original = {key: p.detach().clone() for key, p in model.named_parameters()}
    editor = tiny_editor(model, method, hparams, tmp_path, beta_hse=0.5)
    targets = TeacherForcing.of(editor.edited.stack, tokenizer, [(r.text, r.target_new) for r in ASKED])
    with torch.no_grad():
        before = targets.nll()
        editor.edit(ASKED)
        after = TeacherForcing.of(
            editor.edited.stack, tokenizer, [(r.text, r.target_new) for r in ASKED]
        ).nll()
    assert (after < before).all()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, original[key])}
    assert changed == set(editor.weights.names)
    editor.revert()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, original[key]), key
