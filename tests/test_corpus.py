"""Corpora: streams in a random order, local files, text that a model samples itself or that is shipped."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from sphere import SphereError
from sphere.fingerprint import fingerprint
from sphere.models import DEFAULT_MODEL
from sphere.values import corpus as corpus_module
from sphere.values import self_text
from sphere.values.corpus import Corpus
from sphere.values.self_text import (
    ROWS,
    digest_of,
    sample_documents,
    sampling_key,
    shipped_documents,
    write_documents,
)


def corpus(
    source: str, tokenizer, n: int = 10, *, seed: int = 0, max_tokens: int = 200, model=None
) -> Corpus:
    model = tiny_llama() if model is None else model
    return Corpus(source, n, seed, max_tokens, model, tokenizer, fingerprint(model))


# ---- streams ----


@pytest.fixture
def wikipedia(monkeypatch) -> list[tuple]:
    """A hub of numbered articles in several shards; how it was asked."""
    articles, asked = [f"Article {i:03}" for i in range(400)], []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Dataset.from_dict({"text": articles}).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(corpus_module, "SHUFFLE_BUFFER", 50)
    return asked


def numbers(documents, tokenizer) -> list[int]:
    return [int(tokenizer.decode(ids).split()[1]) for ids in documents]


def test_streamed_articles_are_not_the_first_ones(wikipedia, tiny_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        found = numbers(corpus("wikipedia", tiny_tokenizer, 40).documents(), tiny_tokenizer)
    assert len(set(found)) == 40
    assert max(found) >= 200  # of all of a stream, not of its beginning
    assert found != sorted(found)
    ((name, snapshot), options) = wikipedia[0]
    assert (name, snapshot, options["streaming"]) == ("wikimedia/wikipedia", "20231101.en", True)
    assert "snapshot 20231101.en, shuffled with seed 0 in a buffer of 50" in caplog.text


def test_the_seed_decides_which(wikipedia, tiny_tokenizer):
    drawn = {
        seed: numbers(corpus("wikipedia", tiny_tokenizer, 20, seed=seed).documents(), tiny_tokenizer)
        for seed in (0, 1)
    }
    assert drawn[0] != drawn[1]
    assert drawn[0] == numbers(corpus("wikipedia", tiny_tokenizer, 20).documents(), tiny_tokenizer)


def test_a_streams_key_holds_seed_buffer_and_snapshot(tiny_tokenizer, monkeypatch):
    key = corpus("wikipedia", tiny_tokenizer).key
    assert key["shuffle"] == {"seed": 0, "buffer": 10_000}
    assert "20231101.en" in key["hub"]
    others = [corpus("wikipedia", tiny_tokenizer, seed=1), corpus("wikitext", tiny_tokenizer)]
    others.append(corpus("wikipedia", tiny_tokenizer, max_tokens=9))
    assert all(other.key != key for other in others)
    monkeypatch.setattr(corpus_module, "SHUFFLE_BUFFER", 7)
    assert corpus("wikipedia", tiny_tokenizer).key != key


# ---- files ----


def test_lines_of_a_file(tmp_path, tiny_tokenizer, caplog):
    path = tmp_path / "text.txt"
    path.write_text("First line.\n\nSecond, longer line.\n", "utf-8")
    found = list(corpus(str(path), tiny_tokenizer, max_tokens=8).documents())
    assert [tiny_tokenizer.decode(ids) for ids in found] == ["First li", "Second, "]
    assert "has 2 documents, fewer than mom2_n_samples 10" in caplog.text
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": "First line."}) + "\n", "utf-8")
    assert [tiny_tokenizer.decode(d) for d in corpus(str(lines), tiny_tokenizer, 1).documents()] == [
        "First line."
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("A.jsonl", b"[1]", r'line 1 of .*A\.jsonl is not a JSON object with a text as "text"'),
        ("A.jsonl", b"{", "line 1 of .* is not a JSON object"),
        ("A.jsonl", b'{"text": "b"}\n\n{"text": 5}', "line 3 of .* is not a JSON object"),
        (
            "A.jsonl",
            b'{"text": "a \\ud800 b"}',
            r"'text' in line 1 of .* holds half of a surrogate pair, U\+D800",
        ),
        ("A.jsonl", b'{"text": "\xff"}', "is not text in UTF-8"),
        ("A.txt", b"a\nb \xff\n", "is not text in UTF-8"),
    ],
)
def test_lines_that_are_no_text(name, content, says, tmp_path, tiny_tokenizer):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SphereError, match=says):
        list(corpus(str(path), tiny_tokenizer).documents())


def test_the_shipped_text_is_found_from_anywhere(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = list(corpus("data/sample_text.txt", tiny_tokenizer, 400).documents())
    assert len(documents) == 400
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample_text.txt").write_text("One's own goes first.\n")
    assert len(list(corpus("data/sample_text.txt", tiny_tokenizer, 400).documents())) == 1


def test_errors_of_sources(tmp_path, tiny_tokenizer):
    with pytest.raises(
        SphereError, match="mom2_dataset 'nothing' is neither one of wikipedia, wikitext, self"
    ):
        _ = corpus("nothing", tiny_tokenizer).key
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(SphereError, match="holds no text"):
        list(corpus(str(empty), tiny_tokenizer).documents())


# ---- text that the model writes ----


def test_sampled_documents_are_whole_and_repeatable(tiny_tokenizer):
    state = torch.get_rng_state()
    found = sample_documents(tiny_llama(), tiny_tokenizer, 7, 12, 3, progress=False)
    assert [len(ids) for ids in found] == [12] * 7
    assert all(ids[0] != tiny_tokenizer.eos_token_id for ids in found)
    assert tiny_tokenizer.eos_token_id not in {token for ids in found for token in ids}
    assert found == sample_documents(tiny_llama(), tiny_tokenizer, 7, 12, 3, progress=False)
    assert found != sample_documents(tiny_llama(), tiny_tokenizer, 7, 12, 4, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_models_distribution():
    """Of a model that ignores what it has read, the second tokens are spread as its softmax says."""
    model = tiny_gpt2()
    for parameter in model.parameters():
        parameter.zero_()
    model.transformer.ln_f.bias[0] = 1.0
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(300, 32), requires_grad=False)
    model.lm_head.weight[10, 0] = 9.0  # e^9 against 298 others (the end of a text is ruled out)

    class Ids:
        all_special_ids, bos_token_id, eos_token_id, pad_token_id = (0,), None, 0, 0

        def __len__(self) -> int:
            return 300

    found = sample_documents(model, Ids(), 200, 5, 0, progress=False)
    fraction = sum(token == 10 for ids in found for token in ids[1:]) / 800
    expected = torch.tensor(9.0).exp() / (torch.tensor(9.0).exp() + 298)
    assert fraction == pytest.approx(float(expected), abs=0.02)


def test_documents_begin_with_bos_where_texts_do(tiny_tokenizer):
    """Models trained behind BOS write no sense without it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<|end|>"
    assert sampling_key("a", tokenizer, 0, 12) == sampling_key("a", tiny_tokenizer, 0, 12)  # it adds none
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    found = sample_documents(tiny_llama(), tokenizer, 3, 12, 0, progress=False)
    assert [len(ids) for ids in found] == [12] * 3
    assert [ids.index(0) for ids in found] == [0] * 3
    assert all(0 not in ids[1:] for ids in found)
    assert sampling_key("a", tokenizer, 0, 12)["begin"] == [0]


def test_a_model_of_few_positions_writes_short_documents(tiny_tokenizer):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    found = list(corpus("self", tiny_tokenizer, 2, max_tokens=64, model=model).documents(progress=False))
    assert [len(ids) for ids in found] == [64, 64]


@pytest.fixture
def shipped(tmp_path, tiny_tokenizer, monkeypatch):
    """A shipped file with the text of the tiny model; sampling is an error."""
    monkeypatch.setattr(self_text, "SHIPPED", tmp_path)
    model = tiny_llama()
    documents = [[i % 250, 1, 2] for i in range(2 * ROWS + 50)]
    key = sampling_key(fingerprint(model), tiny_tokenizer, 0, 3)
    write_documents(tmp_path / "tiny.safetensors", documents, key)
    return documents


def test_shipped_text_is_used_instead_of_sampling(shipped, tiny_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(self_text, "sample_documents", None)  # would be an error
    with caplog.at_level(logging.INFO):
        for n in (len(shipped), ROWS, 2 * ROWS):  # the first batches are those of sampling fewer
            found = corpus("self", tiny_tokenizer, n, max_tokens=3)
            assert list(found.documents()) == shipped[:n]
            assert found.key == {"source": "self", "n_documents": n, "token_ids": digest_of(shipped[:n])}
    assert "the first 100 documents of" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"max_tokens": 4}, {"n": 60}, {"n": 300}, {"model": tiny_llama(seed=1)}], ids=str
)
def test_shipped_text_of_anything_else_is_not_used(changes, shipped, tiny_tokenizer):
    options = {"n": ROWS, "max_tokens": 3} | changes
    found = corpus("self", tiny_tokenizer, **options)
    assert "token_ids" not in found.key
    assert found.key["seed"] == changes.get("seed", 0)


def test_fewer_documents_are_the_first_ones_of_whole_batches(tiny_tokenizer, monkeypatch):
    """What the shipped text's first documents stand for."""
    monkeypatch.setattr(self_text, "ROWS", 4)
    more = sample_documents(tiny_llama(), tiny_tokenizer, 12, 6, 0, progress=False)
    assert sample_documents(tiny_llama(), tiny_tokenizer, 8, 6, 0, progress=False) == more[:8]
    assert sample_documents(tiny_llama(), tiny_tokenizer, 6, 6, 0, progress=False) != more[:6]


def test_a_damaged_shipped_file_is_passed_over(tmp_path, caplog):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert shipped_documents({"seed": 0}, 1, tmp_path) is None
    assert "broken.safetensors cannot be read" in caplog.text


def test_the_default_models_text_is_shipped(default_model):
    model, tokenizer = default_model
    key = sampling_key(fingerprint(model), tokenizer, 0, 100)
    documents = shipped_documents(key, 400)
    assert documents is not None
    assert {len(ids) for ids in documents} == {100}
    assert Path(self_text.SHIPPED / f"{DEFAULT_MODEL}.safetensors").stat().st_size < 200_000
