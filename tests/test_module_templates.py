"""Module templates are found in models of many families, by table and by structure alike; defaults fill the rest."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA_MODULES, tiny_llama
from tiny_run import TinyRun, command
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

import sphere
from sphere.commands import hparams as hparams_command
from sphere.defaults import layers_at
from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.forward.module_templates import ModuleTemplates, module_templates
from sphere.hparams import ModuleHParams, load_hparams
from sphere.methods import get_method
from sphere.methods.registry import BUILT_IN
from sphere.runs.hparams import hparams_of, hparams_source
from sphere.runs.run import execute

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
N = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 24, "n_positions": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# model_type -> what its configuration needs beside SMALL
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": N,
    "gptj": {**N, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3, "num_heads": 2},
    "gpt_neox": {},
    "gpt_bigcode": N,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 3, "n_head": 2},
    "falcon": {},
    "mpt": {"d_model": 16, "n_layers": 3, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 32},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "phi": {},
    "phi3": {},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "stablelm": {},
    "starcoder2": {},
}


def tiny(kind: str, **more: Any) -> nn.Module:
    """A random model of three layers."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SMALL, **ARCHITECTURES.get(kind, {}), **more})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def stack_of(model: nn.Module, templates: ModuleTemplates) -> LayerStack:
    return LayerStack(model, ModuleHParams(layers=(0, 1), **templates.to_dict()))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_table_and_structure_agree(kind: str) -> None:
    """And what they name is what an edit needs: the module that writes d values, layers that can be run again."""
    model = tiny(kind)
    table, structure = module_templates(model), module_templates(model, use_table=False)
    assert (table.found_by, structure.found_by) == ("model_type", "structure")
    assert table.to_dict() == structure.to_dict()
    assert table.n_layers == 3
    assert table.editable == structure.editable == (0, 1, 2)
    stack = stack_of(model, table)
    ids = torch.arange(1, 7).view(2, 3)  # 2 rows x 3 positions
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    for layer, keys in stack.module_inputs(inputs).items():
        weight = stack.rewrite[layer].weight
        assert sorted(weight.shape) == sorted((16, keys.shape[-1]))
    recorded = stack.record(inputs, 1, 2)
    whole = stack.run(recorded, recorded.hidden, 1, 2)
    row, position = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    at = stack.run_at(recorded, recorded.hidden, 1, 2, row, position)
    torch.testing.assert_close(at, whole[row, position], rtol=1e-4, atol=1e-5)
    if table.attn_module_tmp:
        model.get_submodule(table.attn_module_tmp.format(2))


def test_an_unknown_model_type_goes_by_structure() -> None:
    model = tiny("llama")
    model.config = copy.deepcopy(model.config)
    model.config.model_type = "nobody_knows"
    found = module_templates(model)
    assert found.found_by == "structure"
    assert found.to_dict() == LLAMA_MODULES


def test_a_family_whose_parts_are_elsewhere_goes_by_structure() -> None:
    model = tiny("llama")
    model.model.blocks, model.model.final = model.model.layers, model.model.norm
    del model.model.layers, model.model.norm
    found = module_templates(model)
    assert found.found_by == "structure"
    assert found.rewrite_module_tmp == "model.blocks.{}.mlp.down_proj"
    assert found.ln_f_module == "model.final"


def test_layers_without_the_module_are_not_edited() -> None:
    """Of a mixture of experts whose first layer is dense, and whose others have a shared expert."""
    more = {**EXPERTS, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "mlp_only_layers": [0]}
    model = tiny("qwen2_moe", **more)
    assert module_templates(model) == ModuleTemplates(
        **{**LLAMA_MODULES, "rewrite_module_tmp": "model.layers.{}.mlp.shared_expert.down_proj"},
        n_layers=4,
        editable=(1, 2, 3),
        found_by="model_type",
    )
    assert module_templates(model, use_table=False).editable == (1, 2, 3)
    assert sphere.default_hparams(model, "ROME").layers == (1,)
    assert sphere.default_hparams(model, "MEMIT").layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mixtral", "No matrix in a layer of MixtralForCausalLM .*without a dense shared expert, cannot be edited"),
        ("qwen3_moe", "No matrix in a layer of Qwen3MoeForCausalLM"),
        ("mamba", "MambaForCausalLM cannot be edited: 3 of its layers keep a recurrent state"),
        ("t5", "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_edited_is_refused_in_a_sentence(kind: str, says: str) -> None:
    if kind == "t5":
        small = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        model: nn.Module = T5ForConditionalGeneration(T5Config(**small))
    else:
        model = tiny(kind, **(EXPERTS if kind == "qwen3_moe" else {"num_local_experts": 4}))
    with pytest.raises(SphereError, match=says) as refused:
        module_templates(model)
    assert "\n" not in str(refused.value)


# ---- defaults ----


@pytest.mark.parametrize("method", BUILT_IN)
def test_every_method_has_defaults_for_any_depth(method: str) -> None:
    for depth in (2, 12):
        hparams = sphere.default_hparams(tiny_llama(layers=depth), method)
        assert isinstance(hparams, get_method(method).hparams_class)
        assert max(hparams.layers) < depth
        assert hparams.rewrite_module_tmp == LLAMA_MODULES["rewrite_module_tmp"]
        assert getattr(hparams, "v_loss_layer", depth - 1) == depth - 1


def test_layers_by_relative_depth() -> None:
    """As in the published files of models with 28, 30 and 32 layers."""
    for depth in (28, 30, 32):
        assert layers_at(0.14, 5, depth, range(depth)) == [4, 5, 6, 7, 8]
    assert layers_at(1.0, 3, 32, range(32)) == [29, 30, 31]
    assert layers_at(0.5, 2, 8, [0, 3, 6, 7]) == [6, 7]
    assert layers_at(0.14, 5, 3, range(3)) == [0, 1, 2]


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world that has hyperparameter files for MEMIT alone."""
    world = TinyRun(tmp_path, tiny_tokenizer, 2)
    for method in BUILT_IN:
        if method != "MEMIT":
            (world.folder / "hparams" / method / "tiny.json").unlink()
    return world


def test_a_run_without_a_file_uses_defaults(world: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sphere")
    run = execute(world.config(alg_name="FT"))
    said = [r.getMessage() for r in caplog.records if "default hyperparameters" in r.getMessage()]
    assert len(said) == 1
    assert "not tuned for this model" in said[0]
    assert "rewrite_module_tmp model.layers.{}.mlp.down_proj" in said[0]
    used = json.loads((run.folder / "run.json").read_text())["hparams"]
    assert used == sphere.default_hparams(run.model, "FT").to_dict()


def test_a_file_goes_before_defaults(world: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sphere")
    config = world.config(alg_name="MEMIT")
    path = world.folder / "hparams" / "MEMIT" / "tiny.json"
    assert hparams_source(config) == path
    assert hparams_of(config) == load_hparams(path, get_method("MEMIT").hparams_class)
    assert not caplog.records


def test_a_file_that_was_asked_for_must_be_there(world: TinyRun) -> None:
    with pytest.raises(SphereError, match=r"No hyperparameter file at .*other\.json"):
        hparams_of(world.config(alg_name="FT", hparams_fname="other.json"))
    with pytest.raises(SphereError, match=r"No hyperparameter file at .*nowhere"):
        hparams_of(world.config(alg_name="FT", hparams_dir=str(world.folder / "nowhere")))


def test_own_defaults_go_before_shipped_ones(world: TinyRun) -> None:
    own = world.folder / "hparams" / "defaults" / "FT.json"
    own.parent.mkdir()
    own.write_text(json.dumps({"layers": {"from": 0, "count": 2}, "num_steps": 7, "lr": 0.5}))
    config = world.config(alg_name="FT")
    hparams = hparams_of(config)
    assert (hparams.layers, hparams.num_steps, hparams.lr) == ((0, 1), 7, 0.5)
    assert hparams_source(config) == own
    own.write_text(json.dumps({"layers": [1], "num_steps": 7, "lr": 0.5}))
    with pytest.raises(
        SphereError, match=r"In the default hyperparameters .*FT\.json: layers must be a relative"
    ):
        hparams_of(config)


def test_a_file_of_nearly_the_same_name_is_mentioned(
    world: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sphere")
    world.model.rename(world.folder / "tiny-Instruct")
    hparams_of(world.config(alg_name="MEMIT", model_name=str(world.folder / "tiny-Instruct")))
    assert "--hparams_fname=tiny.json" in caplog.records[-1].getMessage()


def test_the_command_shows_and_writes(
    world: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model_name={world.model}", f"--hparams_dir={world.folder / 'hparams'}"]

    def said(*more: str) -> tuple[int, str, str]:
        return command(hparams_command.main, [*flags, *more], monkeypatch, capsys)

    code, shown, _ = said("--alg_name=AlphaEdit")
    path = world.folder / "hparams" / "AlphaEdit" / "tiny.json"
    assert code == 0
    assert not path.exists()
    assert said("--alg_name=AlphaEdit", "--write")[0] == 0
    assert path.read_text() == shown
    kind = get_method("AlphaEdit").hparams_class
    assert load_hparams(path, kind) == sphere.default_hparams(tiny_llama(), "AlphaEdit")
    other = world.folder / "hparams" / "MEMIT" / "tiny.json"
    before = other.read_bytes()
    code, _, err = said("--alg_name=MEMIT", "--write")
    assert code == 2
    assert "error: There is a hyperparameter file for this model and method at" in err
    assert "--overwrite" in err
    assert other.read_bytes() == before
    assert said("--alg_name=MEMIT", "--write", "--overwrite")[0] == 0
    assert json.loads(other.read_text())["mom2_update_weight"] == 500
