"""Models spread over devices: every method edits them as it edits a model in one place.

Once on pretended devices, where any mixing of two of them fails; once under accelerate's own hooks, with layers that
are not edited offloaded to disk.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import dispatch_model
from conftest import REQUESTS, tiny_llama, tiny_olmo2
from places import place, pretended_devices
from test_architectures import tiny_hparams

from sphere.baselines.mend.method import edited_shapes
from sphere.baselines.mend.networks import MendEditor
from sphere.data.records import Record
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.evaluation.scoring import score_records
from sphere.fingerprint import fingerprint
from sphere.forward.layers import LayerStack
from sphere.forward.passes import PassOptions
from sphere.hparams import ModuleHParams
from sphere.methods import available_methods
from sphere.values.layer_stats import layer_stats

# Layers 1 and 2 are edited, and they are apart.
MAP = {
    "model.embed_tokens": "cuda:0",
    "model.rotary_emb": "cuda:0",
    "model.layers.0": "cuda:0",
    "model.layers.1": "cuda:1",
    "model.layers.2": "cuda:2",
    "model.layers.3": "cuda:3",
    "model.norm": "cuda:3",
    "lm_head": "cuda:3",
}
METHODS = available_methods()
SOLVES = ("AlphaEdit", "MEMIT_seq", "ROME")  # what --conserve_memory changes


def hparams_of(method: str) -> ModuleHParams:
    hparams = tiny_hparams(method, "Llama3-8B", [1] if method == "ROME" else [1, 2])
    if not hasattr(hparams, "v_loss_layer"):
        return hparams
    return dataclasses.replace(hparams, v_loss_layer=3, v_num_grad_steps=4)


def moment(size: int, layer: int) -> torch.Tensor:
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(layer))
    return x.T @ x / len(x)


def editor_of(model, tokenizer, method: str, folder, **options) -> Editor:
    hparams = hparams_of(method)
    editor = Editor(
        model,
        tokenizer,
        method,
        hparams,
        beta_hse=0.5,
        alpha=0.5,
        stats_dir=folder,
        context_templates=(("{}",), ("Yes. {}",)),
        progress=False,
        **options,
    )
    if hasattr(hparams, "mom2_dataset"):
        for layer in hparams.layers:
            size = editor.edited.weight(layer).shape[1]
            editor.services.second_moments.set(layer, moment(size, layer))
    if method == "MEND":
        torch.manual_seed(0)
        trained = MendEditor(edited_shapes(editor.edited), hparams.rank, hparams.edit_lr)
        trained.save(folder / editor.services.model_label / "mend.safetensors", {})
    return editor


def edited(editor: Editor) -> dict[str, torch.Tensor]:
    """Two batches, with a resume between them."""
    editor.edit(REQUESTS[:2])
    state = editor.state()
    editor.revert()
    editor.load_state(*state)
    editor.edit(REQUESTS[2:])
    return editor.final_weights()


@pytest.mark.parametrize(
    ("method", "conserve_memory", "model_of"),
    [(m, False, tiny_llama) for m in METHODS]
    + [(m, True, tiny_llama) for m in SOLVES]
    + [("MEMIT", False, tiny_olmo2)],
)
def test_edited_layers_on_different_devices(method, conserve_memory, model_of, tiny_tokenizer, tmp_path):
    plain = edited(editor_of(model_of(), tiny_tokenizer, method, tmp_path))
    with pretended_devices():
        model, passes = place(model_of(), MAP), PassOptions(conserve_memory=conserve_memory)
        editor = editor_of(model, tiny_tokenizer, method, tmp_path, passes=passes)
        spread = edited(editor)
        for layer, name in zip(editor.edited.hparams.layers, editor.weights.names, strict=True):
            assert editor.weights.get(name).device == torch.device(f"cuda:{layer}")
    for name, weight in plain.items():
        assert not torch.equal(weight, model_of().get_parameter(name))
        assert torch.allclose(spread[name], weight, rtol=1e-4, atol=1e-6)


def test_bfloat16_masters_live_beside_their_weights(tiny_tokenizer, tmp_path):
    with pretended_devices():
        model = place(tiny_llama().bfloat16(), MAP)
        editor = editor_of(model, tiny_tokenizer, "AlphaEdit", tmp_path)
        editor.edit(REQUESTS)
        for layer, name in zip((1, 2), editor.weights.names, strict=True):
            assert editor.weights.get(name).device == torch.device(f"cuda:{layer}")
            assert editor.weights.get(name).dtype == torch.float32
        editor.revert()
    for name in editor.weights.names:
        assert torch.equal(model.get_parameter(name), tiny_llama().bfloat16().get_parameter(name))


def test_second_moments_and_scores_over_devices(tiny_tokenizer):
    hparams = hparams_of("AlphaEdit")
    ids = [list(range(1, 9)), list(range(20, 25))]
    records = [
        Record(
            r.case_id, r, paraphrase_prompts=(f"{r.subject} has",), neighborhood=(("Rome is in", "Paris"),)
        )
        for r in REQUESTS
    ]
    moments, _ = layer_stats(LayerStack(tiny_llama(), hparams), ids, batch_tokens=64)
    cases = score_records(tiny_llama(), tiny_tokenizer, records, progress=False)
    with pretended_devices():
        model = place(tiny_llama(), MAP)
        spread, _ = layer_stats(LayerStack(model, hparams), ids, batch_tokens=64)
        for layer, moment_ in spread.items():
            assert moment_.device == torch.device(f"cuda:{layer}")
            assert torch.allclose(moment_.cpu(), moments[layer])
        on_host, _ = layer_stats(LayerStack(model, hparams), ids, batch_tokens=8, device=torch.device("cpu"))
        for layer, moment_ in on_host.items():
            assert moment_.device == torch.device("cpu")
            assert torch.allclose(moment_, moments[layer], atol=1e-5)
        assert score_records(model, tiny_tokenizer, records, progress=False) == cases


def test_pretended_devices_refuse_what_real_ones_refuse():
    """Else the tests above prove nothing."""
    with pretended_devices():
        one, two = torch.zeros(3, device="cuda:0"), torch.zeros(3).to("cuda:1")
        for mix in (
            lambda: one + two,
            lambda: one[two.long()],
            lambda: torch.cat([one, two]),
            lambda: one @ two,
            lambda: one * two.sum(),
            lambda: one.index_add_(0, torch.tensor([0], device="cuda:1"), one[:1]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            one.numpy()
        assert (one + torch.tensor(1.0)).device == torch.device("cuda:0")
        assert one[torch.tensor([0])].device == torch.device("cuda:0")
        assert one.copy_(two).device == torch.device("cuda:0")


DISPATCHED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("method", METHODS)
def test_accelerates_hooks_run_when_layers_are_called_one_by_one(method, tiny_tokenizer, tmp_path):
    """Layers whose weights come from disk only within their forward: the hooks must not be passed by."""
    plain = edited(editor_of(tiny_llama(), tiny_tokenizer, method, tmp_path))
    model = dispatch_model(
        tiny_llama(), DISPATCHED, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True
    )
    assert model.get_parameter("model.layers.3.mlp.up_proj.weight").is_meta
    assert fingerprint(model) == fingerprint(tiny_llama())
    spread = edited(editor_of(model, tiny_tokenizer, method, tmp_path))
    for name, weight in plain.items():
        assert torch.allclose(spread[name], weight, rtol=1e-4, atol=1e-6)


def test_an_edited_layer_on_disk_is_refused(tiny_tokenizer, tmp_path):
    model = dispatch_model(
        tiny_llama(),
        {**DISPATCHED, "model.layers.2": "disk"},
        main_device="cpu",
        offload_dir=str(tmp_path / "offload"),
    )
    with pytest.raises(SphereError, match=r"model\.layers\.2.*offloaded"):
        editor_of(model, tiny_tokenizer, "AlphaEdit", tmp_path)
