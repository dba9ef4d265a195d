"""Models whose MLP output is scaled, or passes a norm, before it enters the residual stream.

What their edited modules must add, whether edits reach what z promises there, and the warning where they do not.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import REQUESTS, WIDE, tiny_editor, tiny_hparams, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
)

from benchmarks.plain import keys as plain_keys
from benchmarks.plain import module_residual as plain
from sphere import Editor, EditRequest
from sphere.forward.layers import LayerStack
from sphere.forward.remaining import adds_as_is
from sphere.methods.delivery import check_delivery
from sphere.values.compute_ks import ActivationsPass
from sphere.values.compute_z import TargetValues
from sphere.values.module_residual import module_residual

OWN = {**WIDE, "tie_word_embeddings": False}
GEMMA = {**OWN, "head_dim": 8, "sliding_window": 4}
NORMED: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=30.0),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "olmo2": Olmo2Config(**OWN),
    "glm4": Glm4Config(**OWN, head_dim=8),
}
SCALED = {"granite": GraniteConfig(**OWN, residual_multiplier=0.22)}
LLAMA = LlamaConfig(**OWN)
BARE = (("{}",),)


def model_of(config: PretrainedConfig, seed: int) -> nn.Module:
    """Random weights, those of the norms included."""
    config = copy.deepcopy(config)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def pass_of(model: nn.Module, requests: Sequence[EditRequest] = REQUESTS) -> ActivationsPass:
    stack = LayerStack(model, tiny_hparams("MEMIT", "Llama3-8B"))
    return ActivationsPass(stack, tiny_tokenizer(), requests, BARE, 2048)


def asked_of(activations: ActivationsPass, fraction: float, n: int = len(REQUESTS)) -> Tensor:
    """A random residual (d x n), relative to the outputs of the last edited layer."""
    outputs = activations.outputs(1)[:, :n]
    random = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    return fraction * random * outputs.norm(dim=0) / random.norm(dim=0)


def given(model: nn.Module, layer: int, changes: Tensor) -> Tensor:
    """By how much a layer's output at each request's last token changes with its module's (out x n): (d x n)."""
    columns = []
    for request, change in zip(REQUESTS, changes.T, strict=True):
        f, u = part_of(model, layer, request)
        columns.append(f(u + change) - f(u))
    return torch.stack(columns, dim=1)


def part_of(model: Any, layer: int, request: EditRequest) -> tuple[Any, Tensor]:
    ids = tiny_tokenizer()(request.text)["input_ids"]
    block = model.model.layers[layer]
    return plain.remaining_part(model, block, block.mlp.down_proj, ids)


# ---- the residual of the module ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=80)])
def test_where_the_output_is_added_as_it_is_the_residual_stays_to_the_bit(
    config: PretrainedConfig, dtype: torch.dtype
) -> None:
    model, shipped = model_of(config, 0).to(dtype), "Llama3-8B" if config is LLAMA else "gpt2-xl"
    stack = LayerStack(model, tiny_hparams("MEMIT", shipped))
    activations = ActivationsPass(stack, tiny_tokenizer(), REQUESTS, BARE, 2048)
    residual = asked_of(activations, 0.3)
    assert module_residual(activations, 0, residual) is residual


def test_the_layers_are_asked_once_how_they_add(monkeypatch: pytest.MonkeyPatch) -> None:
    activations = pass_of(model_of(LLAMA, 0))
    assert adds_as_is(activations.stack, [5, 6])
    monkeypatch.setattr(activations.stack, "run", lambda *_: pytest.fail("a layer was run"))
    assert adds_as_is(activations.stack, [7])
    module_residual(activations, 0, torch.ones(16, 3))


def test_where_the_output_is_scaled_the_residual_is_divided() -> None:
    activations = pass_of(model_of(SCALED["granite"], 0))
    residual = asked_of(activations, 2.0)
    for layer in (0, 1):
        found = module_residual(activations, layer, residual)
        torch.testing.assert_close(0.22 * found, residual, rtol=1e-3, atol=1e-3 * float(residual.abs().max()))


@pytest.mark.parametrize(
    ("name", "fraction"), [("gemma2", 0.05), ("gemma3", 0.5), ("olmo2", 0.5), ("glm4", 0.05)]
)
def test_behind_a_norm_it_comes_as_near_as_dense_gauss_newton_steps(name: str, fraction: float) -> None:
    """One layer alone (the last): what is missing is at most 3 % of R more, by a change that is no larger."""
    model = model_of(NORMED[name], 0)
    activations = pass_of(model)
    residual = asked_of(activations, fraction)
    found = module_residual(activations, 1, residual)  # out x n
    missing = (residual - given(model, 1, found)).norm(dim=0) / residual.norm(dim=0)
    for number, request in enumerate(REQUESTS[:2]):
        change, left = plain.least_change([part_of(model, 1, request)], residual[:, number])
        assert missing[number] < left.norm() / residual[:, number].norm() + 0.03
        assert found[:, number].norm() < 1.1 * change.norm()


def test_the_first_of_two_layers_takes_on_its_part_of_the_least_joint_change() -> None:
    model = model_of(NORMED["gemma3"], 0)
    activations = pass_of(model)
    residual = asked_of(activations, 0.05)  # half of what is missing
    found = given(model, 0, module_residual(activations, 0, residual))
    for number, request in enumerate(REQUESTS[:2]):
        parts = [part_of(model, layer, request) for layer in (0, 1)]
        change, left = plain.least_change(parts, 2 * residual[:, number])
        assert left.norm() < 0.05 * residual[:, number].norm()
        f, u = parts[0]
        expected = f(u + change[0]) - f(u)
        assert (found[:, number] - expected).norm() < 0.3 * expected.norm()


def test_requests_with_one_prompt_have_residuals_of_their_own() -> None:
    model = model_of(NORMED["olmo2"], 0)
    twins = [REQUESTS[0], EditRequest(9, REQUESTS[0].prompt, REQUESTS[0].subject, "dutch"), REQUESTS[1]]
    activations, alone = pass_of(model, twins), pass_of(model, twins[:1])
    residual = asked_of(activations, 0.1)
    together = module_residual(activations, 1, residual)
    for number in (0, 1):
        single = module_residual(alone, 1, residual[:, number : number + 1])
        torch.testing.assert_close(together[:, number], single[:, 0], rtol=1e-3, atol=1e-4)
    assert (together[:, 0] - together[:, 1]).norm() > 0.1 * together[:, 0].norm()


def test_half_precision_ends_at_its_rounding() -> None:
    """What is missing is what is in float32, but for the rounding of an output ten times as large as R."""
    whole = model_of(NORMED["gemma3"], 0)
    residual, missing = asked_of(pass_of(whole), 0.1), []
    for model in (whole, copy.deepcopy(whole).bfloat16()):
        found = module_residual(pass_of(model), 1, residual)
        assert found.dtype == torch.float32
        missing.append((residual - given(whole, 1, found)).norm(dim=0) / residual.norm(dim=0))
    assert (missing[1] < missing[0] + 0.1).all()


# ---- edits ----


def probabilities(editor: Editor, requests: Sequence[EditRequest], z: Tensor | None = None) -> Tensor:
    """Of each request's target, per token (geometric mean): (n,). With z (n x d) put in at the subject's last token."""
    tokenizer, found = tiny_tokenizer(), []
    block = editor.edited.model.get_submodule(f"model.layers.{max(editor.edited.hparams.layers)}")
    for number, request in enumerate(requests):
        prompt, target = (tokenizer(t)["input_ids"] for t in (request.text, request.target_new))

        def put(
            _module: nn.Module, _args: Any, output: Any, n: int = number, at: int = len(prompt) - 1
        ) -> Any:
            hidden = (output if isinstance(output, Tensor) else output[0]).clone()
            hidden[0, at] = z[n]
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        handle = block.register_forward_hook(put) if z is not None else None
        with torch.no_grad():
            log_probs = editor.edited.model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        if handle:
            handle.remove()
        places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
        found.append(torch.stack([log_probs[p, t] for p, t in zip(places, target, strict=True)]).mean().exp())
    return torch.stack(found)


class Edit:
    """One batch of REQUESTS: what was there, what z promised, what was reached, and the report."""

    def __init__(self, config: PretrainedConfig, method: str, seed: int, folder: Path) -> None:
        model = model_of(config, seed)
        self.editor = editor = tiny_editor(model, method, tiny_hparams(method, "Llama3-8B"), folder)
        found: list[TargetValues] = []
        compute_z, services = editor.services.compute_z, editor.services

        @functools.wraps(compute_z)
        def noted(*args: Any, **options: Any) -> TargetValues:
            found.append(compute_z(*args, **options))
            return found[-1]

        services.compute_z = noted  # type: ignore[method-assign]
        requests = REQUESTS[:1] if method == "ROME" else REQUESTS
        self.before = probabilities(editor, requests)
        self.report = editor.edit(requests)
        self.reached = probabilities(editor, requests)
        editor.revert()
        self.promised = probabilities(editor, requests, found[0].z)
        top = editor.edited.weight_name(max(editor.edited.hparams.layers))
        self.distance = self.report.layers[top]["z_distance"]


CASES = [(name, "AlphaEdit", seed) for name in (*NORMED, *SCALED) for seed in (0, 1)]
CASES += [("gemma2", "MEMIT", 0), ("olmo2", "MEMIT", 0)]
CASES += [("gemma3", "ROME", 0), ("glm4", "ROME", 0), ("granite", "ROME", 0)]


@pytest.mark.parametrize(("name", "method", "seed"), CASES)
def test_an_edit_reaches_what_z_promises(name: str, method: str, seed: int, tmp_path: Path) -> None:
    edit = Edit((NORMED | SCALED)[name], method, seed, tmp_path)
    assert (edit.promised > 1.5 * edit.before).all()
    assert edit.reached.mean() > 0.6 * edit.promised.mean()
    assert (edit.reached > edit.before).all()
    assert edit.distance < 0.25
    assert not edit.report.warnings
    assert all(m["delta_norm"] < m["weight_norm"] for m in edit.report.layers.values()) or name in SCALED


# ---- what the report says ----


@pytest.mark.parametrize(
    ("method", "weak"), [("AlphaEdit", {"L2": 1e5}), ("MEMIT", {"mom2_update_weight": 1e5})]
)
def test_a_batch_that_falls_short_of_z_is_warned_of(
    method: str, weak: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An update that its ridge keeps small, against the same one without: with SPHERE, as runs are."""
    for number, changes in enumerate(({}, weak)):
        hparams = dataclasses.replace(tiny_hparams(method, "Llama3-8B"), **changes)
        editor = tiny_editor(model_of(LLAMA, 0), method, hparams, tmp_path / str(number), beta_hse=0.5)
        caplog.clear()
        report = editor.edit(REQUESTS)
        *_, top = report.layers.values()
        short = [text for text in report.warnings if "distance to z" in text]
        assert bool(short) == bool(changes)
        assert [r.message for r in caplog.records if "distance to z" in r.message] == short
        assert (top["z_distance"] > 0.9) == (top["residual_delivered"] < 0.1) == bool(changes)


@pytest.mark.parametrize(
    ("distances", "told"),
    [
        ((0.92, 0.7, 0.1), None),
        ((1.09, 0.98, 0.1), None),  # within what varies from batch to batch
        ((1.16, 1.14, 0.32), "after the update of w0, w1 than before the batch (up to 1.16"),
        ((1.16, 1.14, 0.6), "hardly moved towards"),
        ((0.9, 1.2), "went further away from"),
        ((0.9, math.nan), "went further away from"),
        ((None, None), None),
        ((), None),
    ],
)
def test_what_is_said_of_the_distances_to_z(
    distances: tuple[float | None, ...], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = check_delivery({f"w{i}": {"z_distance": d} for i, d in enumerate(distances)}, REQUESTS)
    assert [record.message for record in caplog.records] == found
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def test_layers_that_lead_away_from_z_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A first update that is written the wrong way round; the layers after it make up for it."""
    editor = tiny_editor(model_of(LLAMA, 0), "AlphaEdit", tiny_hparams("AlphaEdit", "Llama3-8B"), tmp_path)
    first = editor.edited.weight_name(min(editor.edited.hparams.layers))
    updates = editor.method.updates
    editor.method.updates = lambda requests: (  # type: ignore[method-assign]
        (name, -3 * delta if name == first else delta) for name, delta in updates(requests)
    )
    report = editor.edit(REQUESTS)
    assert report.layers[first]["z_distance"] > 1.1
    (sentence,) = report.warnings
    assert f"after the update of {first} than before" in sentence


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT", "ROME"])
def test_the_report_says_what_was_reached(method: str, tmp_path: Path) -> None:
    """z_distance is measured again by plain forward passes: from z, before and after."""
    hparams = tiny_hparams(method, "Llama3-8B")
    editor = tiny_editor(model_of(LLAMA, 0), method, hparams, tmp_path, beta_hse=0.5)
    requests = REQUESTS[:1] if method == "ROME" else REQUESTS
    z = editor.services.compute_z(requests).z.T
    editor.services.compute_z = lambda *_a, **_o: TargetValues(z.T, before.T, z[0], z[0])  # type: ignore

    def outputs() -> Tensor:
        layer = editor.edited.model.model.layers[1]
        return plain_keys.outputs(editor.edited.model, tiny_tokenizer(), layer, requests)

    before = outputs()
    report = editor.edit(requests)
    after = outputs()
    expected = (z - after).norm(dim=0).sum() / (z - before).norm(dim=0).sum()
    *below, top = report.layers.values()
    assert top["z_distance"] == pytest.approx(float(expected), rel=1e-3)
    if below:
        assert below[0]["z_distance"] > top["z_distance"]
        assert 0.5 < below[0]["residual_delivered"] < 1.5


def test_a_method_without_target_values_reports_no_distance(tmp_path: Path) -> None:
    editor = tiny_editor(model_of(LLAMA, 0), "FT", tiny_hparams("FT", "Llama3-8B"), tmp_path)
    assert all("z_distance" not in metrics for metrics in editor.edit(REQUESTS).layers.values())


def test_facts_that_z_asks_nothing_for_have_no_distance(tmp_path: Path) -> None:
    """Where the model knows a target already, delta is 0: there is no way to be short of."""
    editor = tiny_editor(model_of(LLAMA, 0), "AlphaEdit", tiny_hparams("AlphaEdit", "Llama3-8B"), tmp_path)
    z = editor.services.activations(REQUESTS).outputs(1).T
    editor.services.compute_z = lambda *_a, **_o: TargetValues(z, z, z[:, 0], z[:, 0])  # type: ignore
    report = editor.edit(REQUESTS)
    *_, top = report.layers.values()
    assert top["z_distance"] is None
    assert not report.warnings
