"""Models that these methods do not fit, or parts of them: one sentence at the start, asked of the model itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import FAMILIES
from test_architectures import WIDE, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sphere import load_model
from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.models import meta_model

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
RECURRENT = {
    "mamba": MambaConfig(**SMALL, state_size=4),
    "rwkv": RwkvConfig(**SMALL, attention_hidden_size=16),
    "jamba": JambaConfig(
        **SMALL, **HEADS, num_experts=2, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False
    ),
    "recurrent-gemma": RecurrentGemmaConfig(**SMALL, **HEADS, lru_width=16),
    "lfm2": Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention", "conv"]),
}
T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
BART = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
                  decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    model = AutoModelForCausalLM.from_config(RECURRENT[name])
    with pytest.raises(SphereError, match=f"{type(model).__name__} cannot be edited: .* recurrent state"):
        LayerStack(model, FAMILIES["mistral"].hparams("MEMIT"))


@pytest.mark.parametrize("kind", [lambda: T5ForConditionalGeneration(T5), lambda: BartForCausalLM(BART)])
def test_encoder_decoders(kind):
    model = kind()
    with pytest.raises(SphereError, match=f"{type(model).__name__} is an encoder-decoder"):
        LayerStack(model, FAMILIES["mistral"].hparams("MEMIT"))


@pytest.mark.parametrize("read", [load_model, meta_model])
def test_encoder_decoders_are_not_even_read(read, tmp_path):
    T5.save_pretrained(tmp_path)
    with pytest.raises(SphereError, match=r"is an encoder-decoder \(t5\)"):
        read(str(tmp_path))


@pytest.mark.parametrize("path", ["model.layers.{}.mlp.experts", "model.layers.{}.mlp.experts.down_proj"])
@pytest.mark.parametrize("config", [MixtralConfig(**WIDE, num_local_experts=4), FAMILIES["qwen2-moe"].config])
def test_experts_in_one_tensor(config, path):
    hparams = dataclasses.replace(FAMILIES["mistral"].hparams("MEMIT"), rewrite_module_tmp=path)
    with pytest.raises(SphereError, match=r"holds the weights of all experts in one tensor \(4 x 16 x \d+\)"):
        LayerStack(tiny_model(config), hparams)


class Routed(nn.Module):
    """An expert of its own that every second token goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, ::2] = self.expert(hidden[:, ::2].reshape(-1, 16)).reshape(hidden[:, ::2].shape)
        return hidden


def test_an_expert_that_some_tokens_go_to():
    model = tiny_model(LlamaConfig(**WIDE))
    for layer in model.model.layers:
        layer.mlp = Routed()
    hparams = dataclasses.replace(
        FAMILIES["mistral"].hparams("MEMIT"), rewrite_module_tmp="model.layers.{}.mlp.expert"
    )
    stack = LayerStack(model, hparams)
    with pytest.raises(SphereError, match="was given 2 vectors for 4 tokens"):
        stack.module_inputs({"input_ids": torch.tensor([[1, 2, 3, 4]])})


def test_more_than_a_norm_and_a_head_above_the_layers():
    """As the OPT models whose embeddings are narrower than their layers."""
    config = OPTConfig(vocab_size=62, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32,
                       word_embed_proj_dim=8, max_position_embeddings=64)  # fmt: skip
    with pytest.raises(SphereError, match="the head of OPTForCausalLM do not give its logits"):
        LayerStack(tiny_model(config), FAMILIES["opt"].hparams("MEMIT"))


def test_an_mlp_that_mixes_positions_is_run_whole():
    """Each position's output depends on the one before it: what only some positions would give is not taken."""

    class Mixing(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own, self.down_proj = own, own.down_proj

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.own(hidden + hidden.roll(1, dims=1))

    model = tiny_model(LlamaConfig(**WIDE)).requires_grad_(False)
    top = model.model.layers[2]
    top.mlp = Mixing(top.mlp)
    stack = LayerStack(model, FAMILIES["mistral"].hparams("MEMIT"))
    recorded = stack.record({"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}, 1, 2)
    row, position = torch.tensor([0, 1, 1]), torch.tensor([3, 2, 5])
    expected = stack.run(recorded, recorded.hidden, 1, 2)[row, position]
    for _ in range(2):  # the first call asks
        assert torch.equal(stack.run_at(recorded, recorded.hidden, 1, 2, row, position), expected)
