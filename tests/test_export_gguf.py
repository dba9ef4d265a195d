"""GGUF exports: everything but the edited tensors byte for byte, these as they should be, read by transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sphere.checkpoints import read_weights, write_checkpoint, write_config
from sphere.errors import SphereError
from sphere.export import ExportOptions, export_run
from sphere.export.gguf_file import architecture_of, tensor_names
from sphere.fingerprint import fingerprint
from sphere.models import load_model

DOWN = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight")
QUERIES = "model.layers.0.self_attn.q_proj.weight"
KINDS = {"blk.0.ffn_down.weight": "Q4_1", "blk.1.ffn_down.weight": "Q8_0", "token_embd.weight": "F16"}
N_EDITS = 3


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_run(folder: Path, model_name: Path, names: tuple[str, ...] = DOWN) -> Path:
    """A run that has added a change of rank 3 to some weights of a model."""
    model, _ = load_model(str(model_name), device="cpu")
    generator = torch.Generator().manual_seed(1)
    original, edited = {}, {}
    for name in names:
        weight = model.get_parameter(name)
        left = torch.randn(weight.shape[0], N_EDITS, generator=generator)
        right = torch.randn(weight.shape[1], N_EDITS, generator=generator)
        original[name], edited[name] = weight.clone(), weight + 0.05 * left @ right.T
    write_checkpoint(folder, 0, original)
    write_checkpoint(folder, N_EDITS, edited)
    known = {"model": fingerprint(model), "model_dtype": "torch.float32", "alg_name": "AlphaEdit"}
    write_config(folder, {"model_name": str(model_name), **known})
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path, tiny_tokenizer, random_model(), KINDS)
    return path


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", source)


def tensors_in(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> type and bytes."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def loaded(path: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_a_copy_in_the_tensors_own_types_differs_in_their_bytes_alone(
    source: Path, run: Path, tmp_path: Path
) -> None:
    export = export_run(run, "gguf", tmp_path / "out")
    copy = tmp_path / "out" / "tiny-edited.gguf"
    before, after = source.read_bytes(), copy.read_bytes()
    assert len(before) == len(after)
    edited = read_weights(run / f"edit_{N_EDITS}.safetensors")
    for tensor in GGUFReader(source).tensors:  # undo the replaced ones
        if tensor.name.endswith("ffn_down.weight"):
            name = DOWN[int(tensor.name.split(".")[1])]
            new = gguf.quants.quantize(edited[name].numpy(), tensor.tensor_type).tobytes()
            place = slice(tensor.data_offset, tensor.data_offset + tensor.n_bytes)
            assert after[place] == new != before[place]
            after = after[: place.start] + before[place] + after[place.stop :]
    assert before == after
    assert "2 of " in export.made[0]
    assert "in Q4_1: off by" in export.made[1]
    assert export.comparison.n_prompts == 20


@pytest.mark.parametrize("quant", ["f16", "f32"])
def test_a_copy_in_another_type_keeps_all_else(quant: str, source: Path, run: Path, tmp_path: Path) -> None:
    """Sizes change, and with them the places of all tensors behind."""
    export_run(run, "gguf", tmp_path / "out", ExportOptions(quant=quant))
    copy = tmp_path / "out" / "tiny-edited.gguf"
    before, after = tensors_in(source), tensors_in(copy)
    assert list(before) == list(after)
    for name, content in before.items():
        if name.endswith("ffn_down.weight"):
            assert after[name][0] == quant.upper()
        else:
            assert after[name] == content, name
    fields = [GGUFReader(path).fields for path in (source, copy)]
    assert list(fields[0]) == list(fields[1])
    assert all(fields[0][key].contents() == field.contents() for key, field in fields[1].items())
    model, edited = loaded(copy), read_weights(run / f"edit_{N_EDITS}.safetensors")
    for name, weight in edited.items():
        kept = weight.half().float() if quant == "f16" else weight
        assert torch.equal(model.get_parameter(name), kept), name


def test_rows_in_the_files_order(source: Path, tmp_path: Path) -> None:
    """Queries and keys of a Llama lie otherwise in GGUF files than in transformers."""
    run = write_run(tmp_path / "run", source, (QUERIES,))
    edited = read_weights(run / f"edit_{N_EDITS}.safetensors")[QUERIES]
    stored = {t.name: t for t in GGUFReader(source).tensors}["blk.0.attn_q.weight"].data
    original = read_weights(run / "edit_0.safetensors")[QUERIES]
    assert not np.array_equal(stored, original.numpy())  # there is something to mend
    export_run(run, "gguf", tmp_path / "copy")
    assert torch.equal(loaded(tmp_path / "copy" / "tiny-edited.gguf").get_parameter(QUERIES), edited)
    export_run(run, "gguf", tmp_path / "adapter", ExportOptions(adapter=True))
    a, b = adapter_of(tmp_path / "adapter", "blk.0.attn_q.weight")
    order = [np.flatnonzero((original.numpy() == row).all(1))[0] for row in stored]
    np.testing.assert_allclose(stored + b @ a, edited.numpy()[order], atol=1e-5)


def adapter_of(folder: Path, tensor: str) -> tuple[np.ndarray, np.ndarray]:
    """lora_a (r x in) and lora_b (out x r), with the scale that llama.cpp gives them."""
    (path,) = folder.glob("*.gguf")
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    found = {t.name: t.data for t in reader.tensors}
    a, b = found[f"{tensor}.lora_a"], found[f"{tensor}.lora_b"]
    assert [int(n) for n in {t.name: t.shape for t in reader.tensors}[f"{tensor}.lora_b"]] == [len(a), len(b)]
    return a, b * (fields["adapter.lora.alpha"] / len(a))


@pytest.mark.parametrize("came_as_gguf", [True, False])
def test_an_adapter_makes_the_edited_weights_of_the_files(
    came_as_gguf: bool, source: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    name = source
    if not came_as_gguf:
        name = tmp_path / "model"
        random_model().save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
    run = write_run(tmp_path / "run", name)
    export = export_run(run, "gguf", tmp_path / "out", ExportOptions(adapter=came_as_gguf))
    before, after = (read_weights(run / f"edit_{n}.safetensors") for n in (0, N_EDITS))
    for layer, weight in enumerate(DOWN):
        a, b = adapter_of(tmp_path / "out", f"blk.{layer}.ffn_down.weight")
        assert len(a) == N_EDITS
        np.testing.assert_allclose(before[weight].numpy() + b @ a, after[weight].numpy(), atol=1e-5)
    assert export.comparison.difference <= 1e-4
    assert "--lora" in (tmp_path / "out" / "README.md").read_text()


def test_rows_whose_order_is_not_known_are_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    random_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    run = write_run(tmp_path / "run", tmp_path / "model", (QUERIES,))
    with pytest.raises(SphereError, match=r"rows of 'blk.0.attn_q.weight' may lie in another order"):
        export_run(run, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_that_cannot_be_written_are_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_tokenizer, random_model(), KINDS | {"blk.0.ffn_down.weight": "Q4_K"})
    run = write_run(tmp_path / "run", path)
    with pytest.raises(SphereError, match=r"of type Q4_K .*choose another one.* f16 or q8_0") as caught:
        export_run(run, "gguf", tmp_path / "out")
    assert caught.value.arguments == ("quant",)
    assert not (tmp_path / "out").exists()
    export_run(run, "gguf", tmp_path / "out", ExportOptions(quant="q8_0"))
    assert tensors_in(tmp_path / "out" / "tiny-edited.gguf")["blk.0.ffn_down.weight"][0] == "Q8_0"


@pytest.mark.parametrize(
    "options, said",
    [({"quant": "q9"}, "Unknown type 'q9'"), ({"quant": "q8_0", "adapter": True}, "are f32 or f16")],
)
def test_bad_types_are_one_sentence(
    options: dict[str, str | bool], said: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(SphereError, match=said):
        export_run(run, "gguf", tmp_path / "out", ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_a_copy_has_no_rank(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sphere.export.run.load_edited",
        lambda *_, **__: pytest.fail("it is known before the model is loaded"),
    )
    with pytest.raises(SphereError, match="a copy of its file, which has no rank") as refused:
        export_run(run, "gguf", tmp_path / "out", ExportOptions(rank=8))
    assert refused.value.arguments == ("rank", "adapter")
    assert not (tmp_path / "out").exists()


def test_names_of_architectures_and_tensors() -> None:
    assert architecture_of("qwen2_moe") == "qwen2moe"
    assert architecture_of("gemma3_text") == "gemma3"
    assert architecture_of("gpt_oss") == "gpt-oss"
    assert architecture_of("mistral") == "llama"
    with pytest.raises(SphereError, match="no architecture 'nonsense'"):
        architecture_of("nonsense")
    convolution = "transformer.h.4.mlp.c_proj.weight"
    assert tensor_names("gpt2", 12, [convolution]) == {convolution: "blk.4.ffn_down.weight"}
    with pytest.raises(SphereError, match=r"no tensor for 'model.layers.0.foo.weight'"):
        tensor_names("llama", 2, ["model.layers.0.foo.weight"])
