"""Target values on disk: found where nothing that they depend on has changed, computed anew everywhere else."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA_MODULES, REQUESTS, tiny_gpt2, tiny_hparams, tiny_llama
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import TinyRun, contents
from transformers import PreTrainedTokenizerBase

import sphere.methods.services
from sphere import EditRequest, HParams
from sphere.forward.passes import PassOptions
from sphere.methods import EditedModel, Services, get_method
from sphere.runs.run import execute
from sphere.values.compute_z import TargetValues, compute_z
from sphere.values.z_cache import FIELDS

TEMPLATES = (("{}",), ("Yes. {}", "No. {}"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each computation of target values had."""
    calls: list[int] = []

    def compute(stack: Any, tokenizer: Any, requests: Any, *args: Any, **options: Any) -> TargetValues:
        calls.append(len(requests))
        return compute_z(stack, tokenizer, requests, *args, **options)

    monkeypatch.setattr(sphere.methods.services, "compute_z", compute)
    return calls


@pytest.fixture
def space(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Services]:
    """Services of tiny models with one cache among them."""

    def make(model: Any = None, method: str = "AlphaEdit", **changes: Any) -> Services:
        templates = changes.pop("given_templates", TEMPLATES)
        passes = {n: changes.pop(n) for n in ("batch_tokens", "z_matmul_dtype") if n in changes}
        hparams = tiny_hparams(LLAMA_MODULES, get_method(method).hparams_class, **changes)
        return Services(
            EditedModel(model or tiny_llama(), tiny_tokenizer, hparams),
            passes=PassOptions(**passes),
            cache_dir=tmp_path,
            progress=False,
            given_templates=templates,
        )

    return make


def assert_equal(found: TargetValues, expected: TargetValues) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_methods_share_values_of_the_unedited_model(space: Any, computed: list[int]) -> None:
    first = space().compute_z(REQUESTS)
    for method in ("AlphaEdit", "MEMIT", "MEMIT_seq", "MEMIT_prune", "MEMIT_rect"):
        assert_equal(space(method=method).compute_z(REQUESTS), first)
    assert_equal(space(layers=[2]).compute_z(REQUESTS), first)  # z is of the last edited layer
    renumbered = [dataclasses.replace(r, case_id=r.case_id + 100, target_true=None) for r in REQUESTS]
    assert_equal(space().compute_z(renumbered), first)
    assert computed == [3]


def test_without_a_cache_nothing_is_written(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, computed: list[int]
) -> None:
    hparams = tiny_hparams(LLAMA_MODULES)
    services = Services(
        EditedModel(tiny_llama(), tiny_tokenizer, hparams), progress=False, given_templates=TEMPLATES
    )
    services.compute_z(REQUESTS)
    services.compute_z(REQUESTS)
    assert computed == [3, 3]
    assert not list(tmp_path.iterdir())


def changed_weight(name: str) -> Any:
    """The model with one number of one weight changed by the least that float32 can tell."""
    model = tiny_llama()
    weight = model.get_parameter(name).data
    weight[..., 0] = torch.nextafter(weight[..., 0], torch.full_like(weight[..., 0], 9.0))
    return model


def changed_config() -> Any:
    """The same weights, another function."""
    model = tiny_llama()
    model.config.rms_norm_eps = 1e-3
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"model": lambda: changed_weight("model.layers.2.mlp.down_proj.weight")},
        {"model": lambda: changed_weight("model.layers.3.self_attn.q_proj.weight")},
        {"model": lambda: changed_weight("model.norm.weight")},
        {"model": lambda: tiny_llama().bfloat16()},
        {"model": lambda: tiny_llama().double()},
        {"model": changed_config},
        {"layers": [1]},
        {"clamp_norm_factor": 1.5},
        {"v_num_grad_steps": 7},
        {"v_lr": 0.4},
        {"v_loss_layer": 2},
        {"v_weight_decay": 0.4},
        {"kl_factor": 0.1},
        {"given_templates": (("{}",), ("Yes. {}", "So. {}"))},
        {"given_templates": (("{}",), ("No. {}", "Yes. {}"))},
        {"batch_tokens": 300},
        {"z_matmul_dtype": torch.bfloat16},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items() if not callable(v)) or None,
)
def test_nothing_stale_is_used(change: dict[str, Any], space: Any, computed: list[int]) -> None:
    space().compute_z(REQUESTS)
    space(**{k: v() if callable(v) else v for k, v in change.items()}).compute_z(REQUESTS)
    assert computed == [3, 3]


@pytest.mark.parametrize("what", ["room", "threads", "attention"])
def test_what_rounding_depends_on_has_its_own(
    what: str, space: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of a micro-batch as they were chosen, though none were asked for; threads; attention."""
    monkeypatch.setattr("sphere.values.compute_z.gradient_tokens", lambda *_: 512)
    space().compute_z(REQUESTS)
    space().compute_z(REQUESTS)
    assert computed == [3]
    model = tiny_llama()
    if what == "room":
        monkeypatch.setattr("sphere.values.compute_z.gradient_tokens", lambda *_: 64)
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    else:
        model.set_attn_implementation("eager")
    space(model).compute_z(REQUESTS)
    assert computed == [3, 3]


@pytest.mark.parametrize(
    "requests",
    [
        REQUESTS[:2],
        REQUESTS[::-1],
        [*REQUESTS[:2], dataclasses.replace(REQUESTS[2], prompt="The town of {}, a country, is")],
        [*REQUESTS[:2], dataclasses.replace(REQUESTS[2], subject="Ox")],
        [*REQUESTS[:2], dataclasses.replace(REQUESTS[2], target_new="Oslo")],
    ],
    ids=["fewer", "order", "prompt", "subject", "target"],
)
def test_other_requests_have_their_own(requests: list[EditRequest], space: Any, computed: list[int]) -> None:
    space().compute_z(REQUESTS)
    space().compute_z(requests)
    assert computed == [3, len(requests)]


def test_another_tokenizer_has_its_own(space: Any, computed: list[int], tiny_tokenizer: Any) -> None:
    first, second = space(), space()
    first.compute_z(REQUESTS)

    class Shifted(type(tiny_tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            encoded = super().__call__(*args, **options)
            encoded["input_ids"] = [i + 1 for i in encoded["input_ids"]]
            return encoded

    second.edited.tokenizer = Shifted(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end|>")
    second.compute_z(REQUESTS)
    assert computed == [3, 3]


@pytest.mark.parametrize(
    ("file", "matters"), [("compute_z.py", True), ("layers.py", True), ("rules.py", False)]
)
def test_other_code_has_its_own(
    file: str, matters: bool, space: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes how z is found need not think of the cache; whoever changes a rule need not lose it."""
    space().compute_z(REQUESTS)
    read = Path.read_text

    def read_text(path: Path, *args: Any) -> str:
        return read(path, *args) + ("\n# changed" if path.name == file else "")

    monkeypatch.setattr(Path, "read_text", read_text)
    space().compute_z(REQUESTS)
    assert computed == [3, 3] if matters else [3]


def test_edited_weights_have_their_own_and_reverted_ones_the_first(space: Any, computed: list[int]) -> None:
    services = space()
    weights = services.edited.weights
    first = services.compute_z(REQUESTS)
    with weights.temporarily():
        name = weights.names[1]
        weights.add_(name, 1e-2 * torch.ones_like(weights.get(name)))
        edited = services.compute_z(REQUESTS)
    assert not torch.equal(edited.z, first.z)
    assert_equal(services.compute_z(REQUESTS), first)
    assert computed == [3, 3]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def write_text(path: Path) -> None:
    path.write_text("nothing")


def another_key(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in FIELDS}
        metadata = file.metadata()
    save_file(tensors, path, metadata={**metadata, "key": "{}"})


def no_key(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in FIELDS}
    save_file(tensors, path)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, write_text, another_key, no_key])
def test_damaged_files_are_computed_again(
    damage: Any, space: Any, computed: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = space().compute_z(REQUESTS)
    (path,) = (tmp_path / "z").iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert_equal(space().compute_z(REQUESTS), first)
    assert f"The target values in {path} are damaged" in caplog.text
    assert_equal(space().compute_z(REQUESTS), first)  # and was replaced
    assert computed == [3, 3]


def test_a_request_does_not_depend_on_its_batch(space: Any) -> None:
    """Beyond rounding: that is why values may be kept per batch and still be called a request's own."""
    together = space(v_num_grad_steps=20).compute_z(REQUESTS)
    for index, request in enumerate(REQUESTS):
        alone = space(v_num_grad_steps=20).compute_z([request])
        assert alone.steps[0] == together.steps[index]
        torch.testing.assert_close(alone.z[0], together.z[index], rtol=1e-3, atol=1e-4)


def test_rome_finds_its_own_again(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, computed: list[int]
) -> None:
    tiny = TinyRun(tmp_path, tiny_tokenizer, 4)
    first = execute(tiny.config("one", alg_name="ROME", use_cache=True)).folder
    assert computed == [1] * 4
    second = execute(tiny.config("two", alg_name="ROME", use_cache=True)).folder
    assert computed == [1] * 4
    assert contents(first) == contents(second)


def test_runs_are_the_same_with_and_without(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, computed: list[int]
) -> None:
    """To the bit, whether values are computed, kept or found."""
    tiny = TinyRun(tmp_path, tiny_tokenizer, 4)
    plain, kept, found = (
        execute(tiny.config(name, use_cache=name != "plain")).folder for name in ("plain", "kept", "found")
    )
    assert computed == [2, 2] * 2
    assert contents(plain) == contents(kept) == contents(found)
    execute(tiny.config("memit", alg_name="MEMIT", use_cache=True))
    assert computed == [2, 2] * 2 + [2]  # the first batch was there


def test_any_architecture_has_a_key(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from conftest import GPT2_MODULES

    hparams: HParams = tiny_hparams(GPT2_MODULES)
    services = Services(
        EditedModel(tiny_gpt2(), tiny_tokenizer, hparams),
        cache_dir=tmp_path,
        progress=False,
        given_templates=TEMPLATES,
    )
    first = services.compute_z(REQUESTS)
    assert_equal(services.compute_z(REQUESTS), first)
