"""Every method on every architecture of the paper, with and without SPHERE, on tiny random models.

Methods come from the registry, those of installed packages included: what holds here holds of every one of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sphere.baselines.mend.method import edited_shapes
from sphere.baselines.mend.networks import MendEditor
from sphere.checkpoints import write_resume
from sphere.editor import Editor
from sphere.forward.layers import LayerStack
from sphere.hparams import ModuleHParams, hparams_from_dict
from sphere.methods import EditedModel, available_methods, get_method
from sphere.methods.teacher_forcing import TeacherForcing
from sphere.requests import EditRequest

HPARAMS = Path(__file__).parents[1] / "hparams"
WORDS = (
    "the therefore because i you . , is a an of in to from speaks plays lives born city language sport country he she "
    "alan turing ada lovelace kurt godel emmy noether french german english dutch london paris berlin rome football "
    "chess tennis golf mother tongue works at and with on very old new famous person who which was"
).split()  # fmt: skip
# The subject stands last: in a random model little else reaches what comes next.
REQUESTS = [
    EditRequest(0, "a very old language of {}", "alan turing", "french", "english"),
    EditRequest(1, "the sport of {}", "ada lovelace", "chess", "golf"),
    EditRequest(2, "the new city of {}", "emmy noether", "rome london", "berlin"),
]
MORE = [EditRequest(3, "the famous person of {}", "kurt godel", "dutch", "german")]
TEMPLATES = (("{}",),)  # the keys of random models have little in common from context to context
SHAPE = {"vocab_size": 2 + len(WORDS), "initializer_range": 0.2}
WIDE = {
    **SHAPE,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GPT = {**SHAPE, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 32, "n_positions": 64}
# name -> (configuration, shipped hyperparameter file)
ARCHITECTURES: dict[str, tuple[PretrainedConfig, str]] = {
    "gpt2": (GPT2Config(**GPT), "gpt2-xl"),
    "gptj": (GPTJConfig(**GPT, rotary_dim=4), "gpt-j-6B"),
    "llama": (LlamaConfig(**WIDE, tie_word_embeddings=False), "Llama3-8B"),
    "llama-tied": (LlamaConfig(**WIDE, tie_word_embeddings=True), "Llama-3.2-1B"),
    "qwen2": (Qwen2Config(**WIDE, tie_word_embeddings=False), "Qwen2.5-7B"),
    "qwen3": (Qwen3Config(**WIDE, head_dim=8, tie_word_embeddings=True), "Qwen3-0.6B"),
    "phi": (PhiConfig(**{**WIDE, "num_key_value_heads": 2}), "phi-1.5"),
}
METHODS = tuple(available_methods())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


def tiny_model(config: PretrainedConfig) -> nn.Module:
    """The same random weights for the same configuration; biases and norms are random, too."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, None
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def tiny_hparams(method: str, shipped: str, layers: list[int] | None = None) -> ModuleHParams:
    """A shipped file with the numbers that depend on the model's size replaced; its templates stay.

    A method without files (another package's) takes MEMIT's, as far as it knows the keys.
    """
    kind = get_method(method).hparams_class
    names = {field.name for field in dataclasses.fields(kind)}
    folder = HPARAMS / method if (HPARAMS / method).is_dir() else HPARAMS / "MEMIT"
    values = json.loads((folder / f"{shipped}.json").read_text())
    small = {
        "layers": layers or ([1] if len(values["layers"]) == 1 else [0, 1]),
        "v_loss_layer": 2,
        "v_num_grad_steps": 20,
        "clamp_norm_factor": 4.0,
        "v_lr": 0.3,
        "v_weight_decay": 1e-3,
        "mom2_update_weight": 1e-3,
        "lambda_e": 1.0,
        "mom2_ridge": 1e-3,
        "nullspace_threshold": 1e9,
        "L2": 1e-3,
        "L1": 1e-3,
        "tau": 3,
        "num_steps": 5,
        "lr": 1e-2,
        "norm_constraint": None,
        "rank": 4,
        "edit_lr": 0.03,
    }
    if method == "UltraEdit":  # of standardised factors: FT's would carry a tiny model too far
        small["lr"] = 3e-3
    values = {k: v for k, v in values.items() if k in names}
    return hparams_from_dict(values | {k: v for k, v in small.items() if k in names}, kind)


def tiny_editor(
    model: nn.Module, method: str, hparams: ModuleHParams, folder: Path, beta_hse: float = 0.0
) -> Editor:
    """An editor whose second moments and trained networks need no corpus and no training."""
    options = {"stats_dir": folder, "progress": False, "context_templates": TEMPLATES}
    editor = Editor(model, tiny_tokenizer(), method, hparams, beta_hse=beta_hse, alpha=0.5, **options)
    if hasattr(hparams, "mom2_dataset"):
        for layer in hparams.layers:
            generator = torch.Generator().manual_seed(layer)
            keys = torch.randn(
                editor.edited.weight(layer).shape[1],
                200,
                generator=generator,
            )
            editor.services.second_moments.set(layer, keys @ keys.T / 200)
    if method == "MEND":  # as it is before training: gradient descent on standardised factors
        torch.manual_seed(0)
        path = folder / editor.services.model_label / "mend.safetensors"
        MendEditor(edited_shapes(editor.edited), hparams.rank, hparams.edit_lr).save(path, {})
    return editor


def resume_points(editor: Editor, batches: Sequence[Sequence[EditRequest]], folder: Path) -> list[Path]:
    """The resume points of an editor after each of these batches, which it edits."""
    saved = []
    for number, batch in enumerate(batches):
        editor.edit(batch)
        saved.append(folder / f"resume_{number}")
        saved[-1].mkdir()
        write_resume(saved[-1], *editor.state())
    return saved


def target_nll(edited: EditedModel) -> torch.Tensor:
    """Mean negative log-likelihood of each request's target: (n,)."""
    pairs = [(r.text, r.target_new) for r in REQUESTS]
    with torch.no_grad():
        return TeacherForcing.of(edited.stack, edited.tokenizer, pairs).nll()


@pytest.mark.parametrize("beta_hse", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_behaviour(architecture: str, method: str, beta_hse: float, tmp_path: Path) -> None:
    check_behaviour(architecture, method, beta_hse, tmp_path)


def check_behaviour(architecture: str, method: str, beta_hse: float, folder: Path) -> None:
    """What every method keeps to.

    An edit raises the probability of each target and changes the named weights only; a state taken up by another
    editor on the unedited model goes on to the same weights; reverting brings every weight back bit for bit.
    """
    config, shipped = ARCHITECTURES[architecture]
    model, hparams = tiny_model(config), tiny_hparams(method, shipped)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    editor = tiny_editor(model, method, hparams, folder, beta_hse)
    before = target_nll(editor.edited)
    report = editor.edit(REQUESTS)
    assert (target_nll(editor.edited) < before).all()
    names = set(editor.weights.names)
    assert set(report.layers) == names
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original[name]) == (name not in names), name
    state = editor.state()
    editor.edit(MORE)
    expected = editor.final_weights()
    editor.revert()
    assert editor.n_edits == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original[name]), name
    resumed = tiny_editor(model, method, hparams, folder, beta_hse)
    resumed.load_state(*state)
    resumed.edit(MORE)
    for name, weight in resumed.final_weights().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_module_paths_resolve(architecture: str) -> None:
    config, shipped = ARCHITECTURES[architecture]
    model = tiny_model(config)
    for method in METHODS:
        stack = LayerStack(model, tiny_hparams(method, shipped))
        assert stack.n_layers == 3
        for key in ("mlp_module_tmp", "attn_module_tmp"):
            model.get_submodule(getattr(stack.hparams, key).format(0))
        assert stack.lm_head is model.get_output_embeddings()


@pytest.mark.parametrize("method", METHODS)
def test_orientation_does_not_matter(method: str, tmp_path: Path) -> None:
    """GPT-2 with Conv1D (in x out), and the same with nn.Linear (out x in) in the edited place: the same edit."""
    config, shipped = ARCHITECTURES["gpt2"]
    conv, linear = tiny_model(config), tiny_model(config)
    for block in linear.transformer.h:
        stored = block.mlp.c_proj
        block.mlp.c_proj = nn.Linear(*stored.weight.shape)
        block.mlp.c_proj.weight.data = stored.weight.data.T.contiguous()
        block.mlp.c_proj.bias.data = stored.bias.data.clone()
    hparams = tiny_hparams(method, shipped)
    editors = [tiny_editor(m, method, hparams, tmp_path, beta_hse=0.5) for m in (conv, linear)]
    for editor in editors:
        editor.edit(REQUESTS)
    for name in editors[0].weights.names:
        first, second = (e.final_weights()[name] for e in editors)
        change = first - conv_original(config, name)
        assert change.norm() > 0
        torch.testing.assert_close(first.T, second, rtol=1e-4, atol=1e-4 * float(change.norm()))


def conv_original(config: PretrainedConfig, name: str) -> torch.Tensor:
    """A weight of the tiny model before any edit."""
    return tiny_model(config).get_parameter(name).detach()
