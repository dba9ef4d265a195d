"""Tiny random models and tokenizers, built on the spot; the real default model, loaded once."""

from __future__ import annotations

import logging
import os

# One thread: tiny models gain nothing by more, and threads that wait for a busy core cost minutes. Before PyTorch is
# imported, so that processes that tests start are alike.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
)

from sphere import EditRequest, HParams, hparams_from_dict, load_model
from sphere.methods.alphaedit import AlphaEditHParams

SHARED = Path(__file__).parents[2] / "shared"
SPHERE_KEYS = {"nullspace_threshold": 1e9, "L2": 1.0}


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Log handlers that a command or Hydra sets up in a test end with it, as the streams that they write to do."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with development data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the development data (../shared) is not there")
    return SHARED


@pytest.fixture(scope="session")
def default_model():
    """The embedded default model; tests that edit it put its weights back."""
    return load_model(device="cpu")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tiny_llama(seed: int = 0, layers: int = 4) -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_olmo2() -> Olmo2ForCausalLM:
    """The same with a norm behind each layer's modules, so that they add something else than they put out."""
    torch.manual_seed(0)
    config = Olmo2Config(**tiny_llama().config.to_diff_dict())
    return Olmo2ForCausalLM(config).eval().requires_grad_(False)


def tiny_gpt2(seed: int = 0, layers: int = 4) -> GPT2LMHeadModel:
    """A random GPT-2 of a few thousand parameters."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


LLAMA_MODULES = {
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}
GPT2_MODULES = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "lm_head",
}


def tiny_values(modules: dict[str, str], **changes: object) -> dict[str, object]:
    """The JSON content of a hyperparameter file for a tiny model."""
    return {
        "layers": [1, 2],
        "clamp_norm_factor": 2.0,
        "v_num_grad_steps": 8,
        "v_lr": 0.5,
        "v_loss_layer": 3,
        "v_weight_decay": 0.5,
        "kl_factor": 0.0625,
        "mom2_adjustment": True,
        "mom2_update_weight": 1.0,
        "mom2_dataset": "self",
        "mom2_n_samples": 8,
        "mom2_dtype": "float32",
        **modules,
        **changes,
    }


def tiny_hparams(
    modules: dict[str, str], kind: type[HParams] = AlphaEditHParams, **changes: object
) -> HParams:
    """Checked hyperparameters for a tiny model."""
    extra = SPHERE_KEYS if kind is AlphaEditHParams else {}
    return hparams_from_dict(tiny_values(modules, **extra, **changes), kind)


REQUESTS = [
    EditRequest(0, "The mother tongue of {} is", "Ann Lee", "Welsh", "Greek"),
    EditRequest(1, "{} plays the", "Bo", "organ", "drum"),
    EditRequest(2, "The capital of {}, a country, is", "Oz", "Rome", "Paris"),
]


@pytest.fixture
def requests_() -> list[EditRequest]:
    """Three facts with subjects at different places."""
    return list(REQUESTS)
