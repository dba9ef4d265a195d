"""Tiny random models of many architectures, and where their modules are: the table of `test_families.py`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from test_architectures import GPT, SHAPE, WIDE, tiny_hparams, tiny_model
from torch import nn
from transformers import (
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from sphere.hparams import ModuleHParams

WINDOW = 8  # of those that have one: prompts are longer
LLAMA = {
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}
GPT2 = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "lm_head",
}
BLOOM = GPT2 | {
    "rewrite_module_tmp": "transformer.h.{}.mlp.dense_4h_to_h",
    "attn_module_tmp": "transformer.h.{}.self_attention",
}
MPT = {
    "rewrite_module_tmp": "transformer.blocks.{}.ffn.down_proj",
    "layer_module_tmp": "transformer.blocks.{}",
    "mlp_module_tmp": "transformer.blocks.{}.ffn",
    "attn_module_tmp": "transformer.blocks.{}.attn",
    "ln_f_module": "transformer.norm_f",
    "lm_head_module": "lm_head",
}
NEOX = {
    "rewrite_module_tmp": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "layer_module_tmp": "gpt_neox.layers.{}",
    "mlp_module_tmp": "gpt_neox.layers.{}.mlp",
    "attn_module_tmp": "gpt_neox.layers.{}.attention",
    "ln_f_module": "gpt_neox.final_layer_norm",
    "lm_head_module": "lm_head",
}
OPT = {
    "rewrite_module_tmp": "model.decoder.layers.{}.fc2",
    "layer_module_tmp": "model.decoder.layers.{}",
    "attn_module_tmp": "model.decoder.layers.{}.self_attn",
    "ln_f_module": "model.decoder.final_layer_norm",
    "lm_head_module": "lm_head",
}
SHARED_EXPERT = LLAMA | {"rewrite_module_tmp": "model.layers.{}.mlp.shared_expert.down_proj"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PLAIN = {k: v for k, v in WIDE.items() if k != "num_key_value_heads"}  # as many heads as queries have
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """A tiny model of an architecture.

    Attributes:
        modules: the templates of hyperparameters.
        norm_behind_mlp: what the MLP puts out is normalised, so that an update's size does not carry over.
        tree_masks: whether it takes the masks of prefix trees.
    """

    config: PretrainedConfig
    modules: dict[str, str] = field(default_factory=lambda: LLAMA)
    norm_behind_mlp: bool = False
    tree_masks: bool = True

    def model(self) -> nn.Module:
        return tiny_model(self.config)

    def hparams(self, method: str, **changes: Any) -> ModuleHParams:
        return dataclasses.replace(
            tiny_hparams(method, "Llama3-8B"), **{"mlp_module_tmp": "", **self.modules}, **changes
        )


FAMILIES = {
    "gpt2-tied-name": Family(GPT2Config(**GPT), GPT2 | {"lm_head_module": "transformer.wte"}),
    "gpt-neo": Family(  # whose window is measured in columns, in a way of its own
        GPTNeoConfig(
            **SHAPE,
            hidden_size=16,
            num_layers=3,
            num_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            window_size=WINDOW,
            attention_types=[[["local", "global", "local"], 1]],
        ),
        GPT2,
        tree_masks=False,
    ),
    "mpt": Family(
        MptConfig(**SHAPE, d_model=16, n_layers=3, n_heads=2, expansion_ratio=2, max_seq_len=64),
        MPT,
        tree_masks=False,
    ),
    "gpt-neox": Family(GPTNeoXConfig(**PLAIN), NEOX),
    "opt": Family(OPTConfig(**PLAIN, ffn_dim=32, word_embed_proj_dim=16), OPT),
    "bloom": Family(BloomConfig(**SHAPE, hidden_size=16, n_layer=3, n_head=2), BLOOM, tree_masks=False),
    "falcon": Family(FalconConfig(**PLAIN), BLOOM),
    "llama-tied-name": Family(
        LlamaConfig(**WIDE, tie_word_embeddings=True), LLAMA | {"lm_head_module": "model.embed_tokens"}
    ),
    "mistral": Family(MistralConfig(**WIDE, sliding_window=WINDOW)),
    "qwen2-window": Family(
        Qwen2Config(**WIDE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen2-moe": Family(
        Qwen2MoeConfig(**WIDE, **EXPERTS, shared_expert_intermediate_size=32),
        SHARED_EXPERT,
    ),
    "phi3": Family(Phi3Config(**WIDE, sliding_window=WINDOW, pad_token_id=None)),
    "cohere": Family(CohereConfig(**WIDE, logit_scale=0.25)),
    "cohere2": Family(Cohere2Config(**WIDE, logit_scale=0.25, sliding_window=WINDOW, layer_types=HYBRID)),
    "granite": Family(GraniteConfig(**WIDE, logits_scaling=4.0, residual_multiplier=0.8)),
    "stablelm": Family(StableLmConfig(**WIDE)),
    "starcoder2": Family(
        Starcoder2Config(**WIDE, sliding_window=WINDOW),
        LLAMA | {"rewrite_module_tmp": "model.layers.{}.mlp.c_proj"},
    ),
    "gemma2": Family(
        Gemma2Config(
            **WIDE, head_dim=8, sliding_window=WINDOW, layer_types=HYBRID, final_logit_softcapping=5.0
        ),
        norm_behind_mlp=True,
    ),
    "gemma3": Family(
        Gemma3TextConfig(**WIDE, head_dim=8, sliding_window=WINDOW, layer_types=HYBRID), norm_behind_mlp=True
    ),
    "olmo2": Family(Olmo2Config(**WIDE), norm_behind_mlp=True),
}
