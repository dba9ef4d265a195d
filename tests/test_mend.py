"""MEND: its updates and its training beside `higher`, through which the published code differentiates edited models.

`higher` patches a copy of the model; here nothing is patched. Tokens and targets are found by plain means (every byte
is a token), the whole model is run, and gradients are autograd's. The model is GPT-2: `higher` cannot copy a Llama as
transformers writes it today, whose forward slices its list of layers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import higher
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2_MODULES, tiny_gpt2
from tiny_run import method_values
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere import Editor, EditRequest, SphereError, hparams_from_dict
from sphere.baselines.mend.factors import Factors
from sphere.baselines.mend.method import MendHParams, edited_shapes
from sphere.baselines.mend.networks import MendEditor
from sphere.baselines.mend.train import configuration, train
from sphere.baselines.mend.training import TrainingSettings, train_editor
from sphere.data.records import Record
from sphere.methods import EditedModel

REQUESTS = [
    EditRequest(0, "The mother tongue of {} is", "Ann Lee", "Welsh", "Greek"),
    EditRequest(1, "{} plays the", "Bo", "organ", "drum"),
]
NEIGHBOR, ANSWER = "Eve plays the", "drum"


def hparams_of(**changes: Any) -> MendHParams:
    return hparams_from_dict({**method_values("MEND"), **GPT2_MODULES, **changes}, MendHParams)


def scored(model: Any, tokenizer: Any, prompt: str, target: str, params: Any = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities where a target's tokens are predicted (tokens x vocabulary), and these tokens."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
    logits = (model(whole) if params is None else model(whole, params=params)).logits[0]
    return F.log_softmax(logits[len(before) - 1 : -1].float(), dim=-1), whole[0, len(before) :]


def nll(model: Any, tokenizer: Any, request: EditRequest, params: Any = None) -> Tensor:
    """Mean negative log-likelihood of a request's target."""
    log_probs, tokens = scored(model, tokenizer, request.text, request.target_new, params)
    return F.nll_loss(log_probs, tokens)


def test_an_untrained_editor_takes_a_step_of_gradient_descent(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Before training, g is the identity: Delta = -edit_lr dL/dW, as `higher` steps by SGD in its inner loop."""
    model, hparams = tiny_gpt2(), hparams_of(edit_lr=0.05)
    names = EditedModel(model, tiny_tokenizer, hparams).weights.names
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    optimizer = torch.optim.SGD([parameters[name] for name in names], lr=0.05)
    with higher.innerloop_ctx(model, optimizer) as (patched, inner):
        inner.step(sum(nll(patched, tiny_tokenizer, request) for request in REQUESTS))
        expected = {name: p.detach() for name, p in patched.named_parameters() if name in names}
    editor = Editor(
        tiny_gpt2(), tiny_tokenizer, "MEND", hparams, beta_hse=0.0, stats_dir=tmp_path, progress=False
    )
    fresh = MendEditor(edited_shapes(editor.edited), hparams.rank, hparams.edit_lr)
    fresh.save(tmp_path / "model" / "mend.safetensors", {})
    editor.edit(REQUESTS)
    for name, weight in editor.final_weights().items():
        change = expected[name] - editor.original[name]
        assert change.norm() > 0
        torch.testing.assert_close(weight - editor.original[name], change, rtol=1e-3, atol=1e-6)


def plain_factors(edited: EditedModel, request: EditRequest) -> dict[int, Factors]:
    """u and delta of every edited layer, of all tokens before the last one, by hooks and one backward pass."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(_module: Any, args: Any, output: Tensor) -> Tensor:
            inputs[layer], outputs[layer] = args[0], output.requires_grad_(True)
            return outputs[layer]

        return keep

    handles = [edited.module(layer).register_forward_hook(hook(layer)) for layer in edited.hparams.layers]
    loss = nll(edited.model, edited.tokenizer, request)
    gradients = torch.autograd.grad(loss, [outputs[layer] for layer in edited.hparams.layers])
    for handle in handles:
        handle.remove()
    return {
        layer: Factors(inputs[layer][0, :-1].detach(), gradient[0, :-1])
        for layer, gradient in zip(edited.hparams.layers, gradients, strict=True)
    }


def test_training_descends_as_through_higher(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Losses of a few steps, and the editor after them; one record, so that nothing is drawn."""
    request, steps = REQUESTS[0], 5
    # the top layer: the factors of a token are then zero unless a target's token is predicted there
    edited = EditedModel(tiny_gpt2(), tiny_tokenizer, hparams_of(layers=[3]))
    record = Record(0, request, neighborhood=((NEIGHBOR, ANSWER),))
    settings = TrainingSettings(steps=steps, num_edits=1, lr=1e-2, c_edit=1.0, neighbors=1)
    trained = train_editor(edited, edited.hparams, [record], settings, progress=False)

    torch.manual_seed(settings.seed)
    editor = MendEditor(edited_shapes(edited), edited.hparams.rank, edited.hparams.edit_lr)
    networks, rates = editor.networks.parameters(), editor.log_lr.parameters()
    adam = torch.optim.Adam(
        [{"params": networks, "lr": settings.lr}, {"params": rates, "lr": settings.lr_lr}]
    )
    patched = higher.monkeypatch(edited.model, copy_initial_weights=False, track_higher_grads=True)
    names = [name for name, _ in edited.model.named_parameters()]
    factors = {  # tokens that the loss does not reach are none of the method's
        layer: Factors(f.inputs[(f.gradients != 0).any(1)], f.gradients[(f.gradients != 0).any(1)])
        for layer, f in plain_factors(edited, request).items()
    }
    losses = []
    for _ in range(steps):
        editor.observe(factors)
        delta = editor(factors)[3]  # out x in
        weight = edited.weight_name(3)
        turned = delta.T if weight in edited.weights.transposed else delta
        params = [
            p + turned if name == weight else p
            for name, p in zip(names, edited.model.parameters(), strict=True)
        ]
        edit = nll(patched, tiny_tokenizer, request, params)
        after, _ = scored(patched, tiny_tokenizer, NEIGHBOR, ANSWER, params)
        with torch.no_grad():
            before, _ = scored(edited.model, tiny_tokenizer, NEIGHBOR, ANSWER)
        local = (before.exp() * (before - after)).sum(dim=1).mean()
        losses.append((float(edit.detach()), float(local.detach())))
        adam.zero_grad()
        (settings.c_edit * edit + settings.c_loc * local).backward()
        adam.step()
    (point,) = trained.curve
    means = torch.tensor(losses).mean(dim=0).tolist()
    assert [point["edit"], point["locality"]] == pytest.approx(means, rel=1e-3)
    assert losses[-1][0] < losses[0][0]
    ours, oracle = trained.editor(factors)[3], editor.eval()(factors)[3]
    assert float((ours - oracle).detach().norm() / oracle.detach().norm()) < 1e-2


def test_records_without_neighbors_train_the_edit_alone(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    edited = EditedModel(tiny_gpt2(), tiny_tokenizer, hparams_of(layers=[3]))
    records = [Record(0, REQUESTS[0], neighborhood=((NEIGHBOR, ANSWER),)), Record(1, REQUESTS[1])]
    for chunk_records in (1, 2):  # a chunk, and a draw, without any
        settings = TrainingSettings(steps=4, num_edits=1, chunk_records=chunk_records)
        (point,) = train_editor(edited, edited.hparams, records, settings, progress=False).curve
        assert point["edit"] > 0
        assert math.isfinite(point["locality"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.steps=many", "steps must be a whole number, got 'many'"),
        ("training.steps=0", "steps must be positive, got 0"),
        ("training.steps=1.5", "steps must be a whole number, got 1.5"),
        ("training.lr=true", "lr must be a number, got True"),
        ("+training.speed=1", "unknown speed"),
        ("training=3", "must be a section"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SphereError, match=says):
        train(configuration([override, "model_name=SmolLM2-135M", f"stats_dir={tmp_path}"]))


def test_the_configuration_file_holds_the_defaults() -> None:
    assert hparams_from_dict(configuration([])["training"], TrainingSettings) == TrainingSettings()
