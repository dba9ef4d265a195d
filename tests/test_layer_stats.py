"""Second moments: equal to one layer per pass, one document at a time; kept on disk under what decides them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, tiny_gpt2, tiny_hparams, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.plain import moments as plain
from sphere import SphereError
from sphere.forward.layers import LayerStack
from sphere.values.layer_stats import SecondMoments, SymmetricSum, layer_stats

MODELS = {"llama": (tiny_llama, LLAMA_MODULES), "gpt2": (tiny_gpt2, GPT2_MODULES)}
DOCUMENTS = [list(range(3, 3 + n)) for n in (5, 40, 1, 17, 17, 2, 33, 9)]


@pytest.fixture(params=list(MODELS))
def stack(request) -> LayerStack:
    make, modules = MODELS[request.param]
    return LayerStack(make(), tiny_hparams(modules, layers=[0, 2]))


@pytest.mark.parametrize("batch_tokens", [16, 100, 4096])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_equals_one_layer_per_pass_one_document_at_a_time(stack, batch_tokens, device):
    """Whatever the batches, padding counts for nothing."""
    found, count = layer_stats(stack, iter(DOCUMENTS), batch_tokens=batch_tokens, pad=7, device=device)
    assert count == sum(map(len, DOCUMENTS))
    assert list(found) == [0, 2]
    for layer, moment in found.items():
        expected = plain.second_moment(stack.model, stack.rewrite[layer], DOCUMENTS)
        assert moment.dtype == torch.float64
        assert (moment - expected).norm() < 1e-5 * expected.norm()
        assert torch.equal(moment, moment.T)
        assert torch.linalg.eigvalsh(moment).min() > -1e-6 * moment.diagonal().max()


def test_nothing_above_the_highest_layer_is_run(stack):
    calls = []
    stack.layers[3].register_forward_hook(lambda *_: calls.append(3))
    layer_stats(stack, DOCUMENTS, batch_tokens=100)
    assert not calls


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), size=st.integers(1, 300), counts=st.lists(st.integers(1, 9), min_size=1)
)
def test_strips_of_the_lower_triangle_make_the_whole_sum(seed, size, counts):
    generator = torch.Generator().manual_seed(seed)
    total, parts = (
        SymmetricSum(size, torch.device("cpu")),
        [torch.randn(n, size, generator=generator) for n in counts],
    )
    for part in parts:
        total.add(part)
    keys = torch.cat(parts).double()
    assert (total.whole() - keys.T @ keys).norm() < 1e-5 * (keys.T @ keys).norm()


def test_many_tokens_lose_nothing_to_float32():
    """Blocks are added in float64: a float32 sum would stop growing."""
    total, keys = SymmetricSum(2, torch.device("cpu")), torch.tensor([[1.0, 0.5]])
    total.total.fill_(2.0**24)
    for _ in range(5):
        total.add(keys)
    assert total.whole()[0, 0] == 2**24 + 5


def moments_of(folder, tokenizer, model=None, **options) -> SecondMoments:
    hparams = tiny_hparams(LLAMA_MODULES)
    stack = LayerStack(tiny_llama() if model is None else model, hparams)
    return SecondMoments(stack, tokenizer, hparams, folder, progress=False, **options)


def test_kept_on_disk_and_read_again(tmp_path, tiny_tokenizer, monkeypatch):
    first = moments_of(tmp_path, tiny_tokenizer)
    kept = {layer: first.get(layer) for layer in (1, 2)}
    assert kept[1].dtype == torch.float32
    monkeypatch.setattr("sphere.values.layer_stats.layer_stats", None)  # would be an error
    again = moments_of(tmp_path, tiny_tokenizer)
    for layer in (1, 2):
        assert torch.equal(again.get(layer), kept[layer])
        assert first.path(layer).exists()
    assert not list(tmp_path.rglob("*.part"))


def test_every_deciding_thing_has_its_own_file(tmp_path, tiny_tokenizer):
    base = moments_of(tmp_path, tiny_tokenizer)
    others = [
        moments_of(tmp_path, tiny_tokenizer, model=tiny_llama(seed=1)),
        moments_of(tmp_path, tiny_tokenizer, seed=1),
    ]
    for key in ("mom2_n_samples", "mom2_dtype"):
        other = moments_of(tmp_path, tiny_tokenizer)
        other.hparams = replace(other.hparams, **{key: 9 if key == "mom2_n_samples" else "float64"})
        others.append(other)
    paths = {moments.path(1) for moments in [base, *others]}
    assert len(paths) == 5
    assert base.path(1) == moments_of(tmp_path, tiny_tokenizer).path(1)


@pytest.mark.parametrize(
    "change",
    ["batch_tokens", "keep_on_cpu", "threads", "attention", "dtype", "config"],
)
def test_what_rounding_depends_on_has_its_own_file(change, tmp_path, tiny_tokenizer, monkeypatch):
    base, options, model = moments_of(tmp_path, tiny_tokenizer).path(1), {}, tiny_llama()
    if change == "batch_tokens":
        options = {"batch_tokens": 17}
    elif change == "keep_on_cpu":
        options = {"keep_on_cpu": True}
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    elif change == "attention":
        model.set_attn_implementation("eager")
    elif change == "dtype":
        model = model.bfloat16()
    else:
        model.config.rms_norm_eps = 1e-3
    assert moments_of(tmp_path, tiny_tokenizer, model=model, **options).path(1) != base


def test_the_text_of_a_file_counts_as_the_tokenizer_cuts_it(tmp_path, tiny_tokenizer):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The mother tongue of Ann.\n", "utf-8")
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="a")
    paths = set()
    for tokenizer in (tiny_tokenizer, other):
        moments = moments_of(tmp_path / "stats", tokenizer)
        moments.hparams = replace(moments.hparams, mom2_dataset=str(corpus), mom2_n_samples=1)
        paths.add(moments.path(1))
    assert len(paths) == 2


def test_a_digest_finds_the_same_numbers_again(tmp_path, tiny_tokenizer, monkeypatch):
    """Wherever they were computed: under other keys, by another number of threads."""
    first = moments_of(tmp_path, tiny_tokenizer)
    digest = first.digest()
    assert digest == moments_of(tmp_path, tiny_tokenizer).digest()
    assert digest != moments_of(tmp_path, tiny_tokenizer, seed=1).digest()
    monkeypatch.setattr("sphere.values.layer_stats.layer_stats", None)  # would be an error
    elsewhere = moments_of(tmp_path, tiny_tokenizer, batch_tokens=17)
    assert not elsewhere.use("0" * 64)
    assert elsewhere.use(digest)
    assert elsewhere.digest() == digest
    for layer in (1, 2):
        assert torch.equal(elsewhere.get(layer), first.get(layer))


def test_a_bit_that_flipped_is_noticed(tmp_path, tiny_tokenizer, caplog):
    first = moments_of(tmp_path, tiny_tokenizer)
    digest, expected, path = first.digest(), first.get(1), first.path(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert not moments_of(tmp_path, tiny_tokenizer).use(digest)
    assert torch.equal(moments_of(tmp_path, tiny_tokenizer).get(1), expected)
    assert "is damaged (its content is not what was written)" in caplog.text


def test_a_given_moment_has_a_digest(tmp_path, tiny_tokenizer):
    digests = []
    for factor in (1.0, 2.0, 1.0):
        moments = moments_of(tmp_path, tiny_tokenizer)
        for layer in (1, 2):
            moments.set(layer, factor * torch.eye(48))
        digests.append(moments.digest())
    assert digests[0] == digests[2] != digests[1]


def test_a_model_of_few_positions_is_given_no_longer_text(tmp_path, tiny_tokenizer):
    """Text that the model writes itself is as long as it can read."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=64, eos_token_id=0)
    hparams = tiny_hparams(GPT2_MODULES, mom2_n_samples=2)
    stack = LayerStack(GPT2LMHeadModel(config).eval().requires_grad_(False), hparams)
    moments = SecondMoments(stack, tiny_tokenizer, hparams, tmp_path, progress=False)
    assert torch.isfinite(moments.get(1)).all()


def test_a_damaged_file_is_computed_again(tmp_path, tiny_tokenizer, caplog):
    first = moments_of(tmp_path, tiny_tokenizer)
    expected = first.get(1)
    first.path(1).write_bytes(b"damaged")
    assert torch.equal(moments_of(tmp_path, tiny_tokenizer).get(1), expected)
    assert "damaged" in caplog.text


def test_a_given_moment_needs_no_corpus(tmp_path, tiny_tokenizer):
    moments = moments_of(tmp_path, tiny_tokenizer)
    moments.set(1, torch.eye(48))
    assert torch.equal(moments.get(1), torch.eye(48))
    assert not list(tmp_path.iterdir())


def test_a_local_corpus_is_known_by_its_content(tmp_path, tiny_tokenizer):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The mother tongue of Ann.\nA second line.\n", "utf-8")
    moments = moments_of(tmp_path / "stats", tiny_tokenizer)
    moments.hparams = replace(moments.hparams, mom2_dataset=str(corpus), mom2_n_samples=2)
    path = moments.path(1)
    assert torch.isfinite(moments.get(1)).all()
    corpus.write_text("Something else.\n", "utf-8")
    changed = moments_of(tmp_path / "stats", tiny_tokenizer)
    changed.hparams = moments.hparams
    assert changed.path(1) != path


def test_errors_say_what_to_change(tmp_path, tiny_tokenizer, stack):
    with pytest.raises(SphereError, match="mom2_dataset"):
        layer_stats(stack, [], batch_tokens=100)
    broken = tiny_llama()
    broken.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    text = tmp_path / "text.txt"
    text.write_text("One line of text.\n", "utf-8")
    moments = moments_of(tmp_path, tiny_tokenizer, model=broken)
    moments.hparams = replace(moments.hparams, mom2_dataset=str(text))
    with pytest.raises(SphereError, match="dtype float32"):
        moments.get(1)
