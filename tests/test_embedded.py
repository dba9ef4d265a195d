"""Embedded models: found without importing their packages, put together once, kept in the cache, checked when used."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_llama
from gguf_files import write_gguf
from transformers import PreTrainedTokenizerBase

from sphere import SphereError, embedded, load_model
from sphere.embedded import EMBEDDED, Embedded, assemble, part_files
from sphere.fingerprint import fingerprint
from sphere.kept_folders import cache_folder, kept_folder
from sphere.models import KEPT, load_tokenizer, meta_model
from sphere.values.self_text import sampling_key, shipped_documents
from sphere.values.tokenization import encode

GEMMA = "gemma-3-270m"
USERS_CACHE = cache_folder()  # before `cache` hides it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sphere"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, sha256: str = "") -> Embedded:
    """Two packages with a half of `content` each, which cannot be imported, declared as the embedded model "halves"."""
    middle = len(content) // 2
    for package, half in {"first_half": content[:middle], "second_half": content[middle:]}.items():
        (folder / package / "data").mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / package / "data" / f"{package}.part").write_bytes(half)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    declared = Embedded(
        (("first_half", "data/*.part"), ("second_half", "data/*.part")),
        "halves==1",
        "Some terms",
        sha256 or hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(EMBEDDED, "halves", declared)
    return declared


def test_parts_are_found_without_importing_their_packages(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, b"one two")
    assert [path.read_bytes() for path in part_files("halves")] == [b"one", b" two"]


@pytest.mark.parametrize("lost", ["second_half", "second_half/data/second_half.part"])
def test_a_missing_part_is_one_sentence_with_the_command(lost, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, b"one two")
    (tmp_path / "site" / lost).rename(tmp_path / "elsewhere")
    importlib.invalidate_caches()
    with pytest.raises(SphereError, match=r"second_half is missing.*pip install halves==1`.*Some terms"):
        load_model("halves", device="cpu")


def test_parts_are_put_together_in_order_or_not_at_all(tmp_path, monkeypatch):
    declared = install(tmp_path / "site", monkeypatch, b"one two")
    whole = tmp_path / "new" / "whole"
    assemble(part_files("halves"), whole, declared.sha256)
    assert whole.read_bytes() == b"one two"
    whole.unlink()
    with pytest.raises(SphereError, match=f"SHA-256 .*, not {'0' * 64}: install"):
        assemble(part_files("halves"), whole, "0" * 64)
    assert not list(whole.parent.iterdir())


def test_parts_that_are_not_as_declared_are_no_model(tmp_path, monkeypatch, cache):
    install(tmp_path / "site", monkeypatch, b"one two", sha256="0" * 64)
    with pytest.raises(SphereError, match="install their packages anew"):
        load_model("halves", device="cpu")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


class Maker:
    """Writes two files; counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "a").write_bytes(b"first")
        (folder / "b").write_bytes(b"second")


def test_a_kept_folder_is_made_once():
    make = Maker()
    folder = kept_folder("thing", make)
    assert folder == kept_folder("thing", make) == cache_folder() / "thing"
    assert (folder / "b").read_bytes() == b"second"
    assert make.times == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "lost", "no list", "no JSON"])
def test_a_damaged_folder_is_made_anew(damage):
    make = Maker()
    folder = kept_folder("thing", make)
    if damage == "cut":
        (folder / "b").write_bytes(b"sec")
    elif damage == "changed":
        (folder / "b").write_bytes(b"sEcond")
    elif damage == "lost":
        (folder / "a").unlink()
    elif damage == "no list":
        (folder / "kept.json").unlink()
    else:
        (folder / "kept.json").write_text("[")
    assert (kept_folder("thing", make) / "b").read_bytes() == b"second"
    assert (folder / "a").exists()
    assert make.times == 2


def test_what_fails_or_is_killed_leaves_no_folder(cache):
    def fails(folder: Path) -> None:
        (folder / "a").write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        kept_folder("thing", fails)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    (cache / ".thing.making.killed").mkdir()
    kept_folder("thing", Maker())
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["thing"]


def test_a_cache_that_cannot_be_written_to_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SphereError, match=r"Cannot keep thing in .*XDG_CACHE_HOME"):
        kept_folder("thing", Maker())


def test_a_model_in_parts_is_that_of_its_gguf_file_bit_for_bit(
    tmp_path, monkeypatch, tiny_tokenizer, cache, caplog
):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, tiny_tokenizer, tiny_llama())
    expected, tokenizer = load_model(str(whole), device="cpu")
    install(tmp_path / "site", monkeypatch, whole.read_bytes())
    with caplog.at_level("INFO"):
        load_model("halves", device="cpu")
    assert "Some terms" in caplog.text
    monkeypatch.setattr(embedded.importlib.util, "find_spec", None)  # the second time nothing is looked for
    model, again = load_model("halves", device="cpu")
    assert model.dtype == torch.float32
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[key], weight) for key, weight in expected.state_dict().items())
    assert again("The thing {}").input_ids == tokenizer("The thing {}").input_ids
    assert meta_model("halves").config.hidden_size == expected.config.hidden_size
    assert not list(cache.rglob("*.gguf"))


@pytest.mark.parametrize("mistaken", [False, True])
def test_a_tokenizer_has_the_special_tokens_of_its_gguf_file(tmp_path, monkeypatch, tiny_tokenizer, mistaken):
    """Also where transformers takes BOS for EOS, as versions of it do."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_tokenizer, tiny_llama())
    read = transformers.AutoTokenizer.from_pretrained

    def mistake(*args: Any, **options: Any) -> PreTrainedTokenizerBase:
        tokenizer = read(*args, **options)
        tokenizer.eos_token = tokenizer.bos_token
        return tokenizer

    if mistaken:
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", mistake)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)
    assert {0, 1} <= set(tokenizer.all_special_ids)


def test_a_tokenizer_that_transformers_fails_at_is_one_sentence(tmp_path, monkeypatch, tiny_tokenizer):
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("'Skeleton' object has no attribute 'bos_token_id'")

    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_tokenizer, tiny_llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(SphereError, match=r"Cannot load the tokenizer of '.*tiny.gguf' \('Skeleton'"):
        load_model(str(path), device="cpu")


def test_gemmas_parts_are_the_file_that_is_declared():
    try:
        parts = part_files(GEMMA)
    except SphereError:
        pytest.skip(f"{GEMMA} is not installed (requirements-gemma.txt)")
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    assert digest.hexdigest() == EMBEDDED[GEMMA].sha256


def test_gemma_is_configured_and_continues_texts(monkeypatch):
    """Its published configuration, its shipped text, BOS, and a fact that it knows; only where it is kept already."""
    if not any(USERS_CACHE.glob(f"{GEMMA}-*-{KEPT}-transformers-{transformers.__version__}/kept.json")):
        pytest.skip(f"{GEMMA} was never loaded here, and putting it together takes minutes")
    monkeypatch.setenv("XDG_CACHE_HOME", str(USERS_CACHE.parent))
    model, tokenizer = load_model(GEMMA, device="cpu")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (18, 640, 2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 256)
    assert (config.vocab_size, config.sliding_window, config.query_pre_attn_scalar) == (262144, 512, 256)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.rms_norm_eps == pytest.approx(1e-6)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    documents = shipped_documents(sampling_key(fingerprint(model), tokenizer, 0, 100), 100)
    assert documents is not None
    assert {(len(ids), ids[0]) for ids in documents} == {(100, tokenizer.bos_token_id)}
    ids = encode(tokenizer, "Albert Einstein was born in").ids
    assert ids[0] == tokenizer.bos_token_id
    written = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=10)
    assert "1879 in Ulm" in tokenizer.decode(written[0])
