"""GGUF files of tiny Llamas, with tensors of chosen types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def write_gguf(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: LlamaForCausalLM,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """A Llama as a GGUF file.

    Args:
        kinds: name of a tensor -> its type; the others are F32.
    """
    kinds = kinds or {}
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += ["th", "he", *(f"<{i}>" for i in range(len(tokens) + 2, config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h", "h e"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, (".weight",))
        kind = GGMLQuantizationType[kinds.get(name, "F32")]
        values = weight.numpy().astype(np.float32)
        if kind == GGMLQuantizationType.Q4_K:
            writer.add_tensor(name, q4_k(values.shape), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_k(shape: tuple[int, int]) -> np.ndarray:
    """Some values of a type that the gguf package reads and does not write: scale, minimum, 140 bytes of 256 values."""
    blocks = np.random.default_rng(0).integers(0, 255, (shape[0], shape[1] // 256, 144), dtype=np.uint8)
    blocks[..., :4] = np.frombuffer(np.array([1e-3, 1e-3], dtype=np.float16).tobytes(), dtype=np.uint8)
    return blocks.reshape(shape[0], -1)
