"""RECT's, PRUNE's and ROME's equations on small matrices, each beside the same computed by plain means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import method_values
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere import Editor, EditRequest, SphereError, get_method, hparams_from_dict
from sphere.rules import CondenseSpectrum, LargestRelative
from sphere.values.compute_z import TargetValues

quick = settings(max_examples=40, deadline=None)
OUT, IN = 6, 10


def matrix(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- RECT ----


def largest(delta: Tensor, weight: Tensor, dropped: int) -> list[list[bool]]:
    """Which entries stay when those below the `dropped`-th smallest |Delta / (W + 1e-8)| go: one by one."""
    ratios = [
        [abs(d / (w + 1e-8)) for d, w in zip(*rows, strict=True)]
        for rows in zip(delta.tolist(), weight.tolist(), strict=True)
    ]
    if not dropped:
        return [[True] * len(row) for row in ratios]
    threshold = sorted(r for row in ratios for r in row)[dropped - 1]
    return [[r >= threshold for r in row] for row in ratios]


@quick
@given(seed=st.integers(0, 2**31 - 1), kept=st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.9, 1.0]))
def test_rect_keeps_exactly_the_largest_relative_changes(seed: int, kept: float) -> None:
    delta, weight = matrix(seed, OUT, IN), matrix(seed + 1, OUT, IN)
    found, metrics = LargestRelative(kept).apply(delta, weight)
    stay = torch.tensor(largest(delta, weight, int((1 - kept) * OUT * IN)))
    assert torch.equal(found, delta * stay)
    assert metrics["kept_norm_share"] == pytest.approx(float(found.norm() / delta.norm()))
    assert int((found != 0).sum()) == OUT * IN - max(0, int((1 - kept) * OUT * IN) - 1)


def test_rect_keeps_all_ties_at_its_threshold() -> None:
    weight = torch.ones(2, 5, dtype=torch.float64)
    delta = torch.tensor([[1.0, -2, 2, 3, -1], [2, 5, -4, 0, 2]], dtype=torch.float64)
    found, _ = LargestRelative(0.5).apply(delta, weight)  # 5 are dropped at most; the fifth smallest is a 2
    assert torch.equal(found, torch.tensor([[0.0, -2, 2, 3, 0], [2, 5, -4, 0, 2]], dtype=torch.float64))


def test_rect_measures_changes_by_the_weight_and_not_by_their_size() -> None:
    weight = torch.tensor([[100.0, 0.1], [10.0, 0.01]])
    delta = torch.tensor([[9.0, 0.05], [-8.0, 0.001]])
    found, _ = LargestRelative(0.5).apply(delta, weight)  # relative: 0.09, 0.5; 0.8, 0.1
    assert torch.equal(found, torch.tensor([[0.0, 0.05], [-8.0, 0.001]]))


@pytest.mark.parametrize("kept", [0.0, -0.1, 1.1, math.nan])
def test_rect_keeps_a_fraction(kept: float) -> None:
    with pytest.raises(SphereError, match=r"fraction of entries .* in \(0, 1\]"):
        LargestRelative(kept)


# ---- PRUNE ----


@quick
@given(
    seed=st.integers(0, 2**31 - 1),
    base=st.sampled_from([1.2, 2.0, math.e]),
    scale=st.sampled_from([1.0, 4.0, 100.0]),
)
def test_prune_condenses_the_spectrum(seed: int, base: float, scale: float) -> None:
    """Against NumPy's SVD: what is above the weight's largest value is condensed, the rest and the directions stay."""
    weight, delta = matrix(seed, OUT, IN), scale * matrix(seed + 1, OUT, IN)
    found, metrics = CondenseSpectrum(base).apply(delta, weight)
    top = np.linalg.norm(weight.numpy(), 2)
    u, s, vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    condensed = [v if v <= top else math.log(v, base) - math.log(top, base) + top for v in s]
    np.testing.assert_allclose(found.numpy(), u @ np.diag(condensed) @ vh, atol=1e-8 * scale)
    assert metrics["condensed"] == int((s > top).sum())


def test_prune_changes_nothing_below_the_largest_value() -> None:
    weight, delta = matrix(0, OUT, IN), 0.1 * matrix(1, OUT, IN)
    found, metrics = CondenseSpectrum().apply(delta, weight)
    assert torch.equal(found, delta)
    assert metrics["condensed"] == 0


def editor_of(method: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Editor:
    """An editor of a tiny Llama without SPHERE; its second moments need no corpus."""
    hparams = hparams_from_dict(method_values(method, **changes), get_method(method).hparams_class)
    templates = (("{}",), ("Yes. {}", "So. {}"))
    editor = Editor(
        tiny_llama(), tokenizer, method, hparams, beta_hse=0.0, context_templates=templates, progress=False
    )
    for layer in hparams.layers:
        keys = matrix(layer, 48, 200).float()
        editor.services.second_moments.set(layer, keys @ keys.T / 200)
    return editor


def test_prune_saves_the_condensed_total_change(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """After two batches: W_0 + condensed (W - W_0), while W itself stays as MEMIT has written it."""
    wide = {"mom2_update_weight": 1e-6, "clamp_norm_factor": 50.0, "v_lr": 5.0, "v_weight_decay": 0.0}
    editor = editor_of("MEMIT_prune", tiny_tokenizer, **wide)
    for request in REQUESTS:
        editor.edit([request])
    saved, several = editor.final_weights(), 0
    for name in editor.weights.names:
        original = editor.original[name].double().numpy()
        change = editor.weights.get(name).double().numpy() - original
        top = np.linalg.norm(original, 2)
        u, s, vh = np.linalg.svd(change, full_matrices=False)
        several += int((s > top).sum())
        condensed = np.where(s > top, np.log(np.maximum(s, 1e-300)) - np.log(top) + top, s)
        expected = original + u @ np.diag(condensed) @ vh
        np.testing.assert_allclose(saved[name].numpy(), expected, atol=1e-4 * top)
    assert several > 0


# ---- ROME ----

REQUESTS = [
    EditRequest(0, "The mother tongue of {} is", "Ann Lee", "Welsh"),
    EditRequest(1, "{} plays the", "Bo", "organ"),
]


def plain_key(model: Any, tokenizer: Any, template: str, request: EditRequest, layer: int) -> Tensor:
    """What enters the edited module at the subject's last token: (in,) float64. Every byte is a token."""
    prompt = template.replace("{}", request.prompt)
    end = len(prompt[: prompt.index("{}")] + request.subject)
    seen: list[Tensor] = []
    module = model.model.layers[layer].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**tokenizer(prompt.format(request.subject), return_tensors="pt"))
    handle.remove()
    return seen[0][0, end - 1].double()


@pytest.mark.parametrize("adjusted", [True, False], ids=["second moment", "identity"])
def test_rome_maps_the_key_to_its_value(
    adjusted: bool, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W' k = v* with v* = W k + delta, by a rank-one change along u = M^-1 k_mean."""
    editor = editor_of("ROME", tiny_tokenizer, mom2_adjustment=adjusted)
    model, layer = editor.edited.model, editor.edited.hparams.layers[0]
    for number, request in enumerate(REQUESTS):
        delta = matrix(number, 1, 32).float()
        values = TargetValues(delta, torch.zeros_like(delta), torch.zeros(1), torch.ones(1))
        monkeypatch.setattr(editor.services, "compute_z", lambda *_args, v=values, **_options: v)
        before = editor.edited.weight(layer).double()
        k = plain_key(model, tiny_tokenizer, "{}", request, layer)
        keys = [plain_key(model, tiny_tokenizer, t, request, layer) for t in ("{}", "Yes. {}", "So. {}")]
        editor.edit([request])
        after = editor.edited.weight(layer).double()
        value = before @ k + delta[0].double()  # v*
        torch.testing.assert_close(after @ k, value, rtol=1e-4, atol=1e-4)
        change = after - before
        u = torch.stack(keys).mean(dim=0)
        if adjusted:
            u = torch.linalg.solve(editor.services.second_moment(layer).double(), u)
        expected = torch.outer(delta[0].double(), u) / (k @ u)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 1
