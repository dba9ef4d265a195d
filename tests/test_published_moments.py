"""Second moments in the layout of ROME's projects give the same edit as one's own; what is none is refused."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LLAMA_MODULES, REQUESTS, tiny_hparams, tiny_llama
from tiny_run import TinyRun, contents
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sphere import Editor, SphereError
from sphere.forward.layers import LayerStack
from sphere.linalg import extreme_eigenvalues
from sphere.runs.run import execute
from sphere.values.layer_stats import SecondMoments
from sphere.values.published_moments import published_files, read_moment

TOKENS = 1000
MODULE = "model.layers.{}.mlp.down_proj"
PLACE = "self_stats"  # of the corpus that the tiny hyperparameters name


def publish(
    path: Path, total: Any, count: Any = TOKENS, save: Callable[..., None] = np.savez, **more: Any
) -> Path:
    """Write the sum of k k^T as those projects do; None leaves an array out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": total.numpy() if isinstance(total, Tensor) else total,
        "sample_size": 8,
    }
    save(path, **{k: v for k, v in (arrays | more).items() if v is not None})
    return path


def moments_of(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None, **options: Any
):
    hparams = tiny_hparams(LLAMA_MODULES)
    stack = LayerStack(model or tiny_llama(), hparams)
    return SecondMoments(stack, tokenizer, hparams, folder, progress=False, **options)


@pytest.fixture(scope="module")
def own(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase
) -> dict[int, Tensor]:
    """Layer -> the model's own second moment (in x in), of a sum in float32."""
    moments = moments_of(tmp_path_factory.mktemp("own"), tiny_tokenizer)
    sums = {layer: (moments.get(layer).double() * TOKENS).float() for layer in (1, 2)}
    return {layer: (total.double() / TOKENS).float() for layer, total in sums.items()}


@pytest.fixture
def theirs(own: dict[int, Tensor], tmp_path: Path) -> Path:
    """The folder of a model in stats_dir, with published files for both edited layers."""
    for layer, moment in own.items():
        total = (moment.double() * TOKENS).float()
        publish(tmp_path / "model" / PLACE / f"{MODULE.format(layer)}_float32_mom2_8.npz", total)
    return tmp_path / "model"


@pytest.fixture
def computing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphere.values.layer_stats.layer_stats", None)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("computing_is_an_error")
def test_the_same_edit_as_from_ones_own(
    given: bool, own: dict[int, Tensor], theirs: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def edited(moments: dict[int, Tensor] | None, **places: Any) -> dict[str, Tensor]:
        editor = Editor(
            tiny_llama(), tiny_tokenizer, "AlphaEdit", tiny_hparams(LLAMA_MODULES), progress=False, **places
        )
        for layer, moment in (moments or {}).items():
            editor.services.second_moments.set(layer, moment)
        editor.edit(REQUESTS)
        return editor.final_weights()

    places = {"stats_from": theirs} if given else {"stats_dir": theirs.parent}
    expected, found = edited(own), edited(None, **places)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)


@pytest.mark.usefixtures("computing_is_an_error")
def test_digest_and_continuing(
    own: dict[int, Tensor], theirs: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A run says which numbers it began with, whoever computed them."""
    ours = moments_of(theirs.parent / "other", tiny_tokenizer)
    for layer, moment in own.items():
        ours.set(layer, moment)
    assert moments_of(theirs, tiny_tokenizer).digest() == ours.digest()
    again = moments_of(theirs, tiny_tokenizer)
    assert again.use(ours.digest())
    assert torch.equal(again.get(1), own[1])
    assert not again.use("another")


def test_ones_own_files_go_first_unless_others_are_named(
    theirs: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    hidden = theirs.rename(theirs.with_name("hidden"))
    computed = moments_of(theirs, tiny_tokenizer).digest()
    (hidden / PLACE).rename(theirs / PLACE)
    assert moments_of(theirs, tiny_tokenizer).digest() == computed
    assert moments_of(theirs, tiny_tokenizer, stats_from=theirs / PLACE).digest() != computed


@pytest.mark.usefixtures("computing_is_an_error")
@pytest.mark.parametrize("folder", ["somebody_tiny", "tiny"])
def test_the_name_of_the_hub_is_looked_for_too(
    folder: str, theirs: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    theirs.rename(theirs.parent / folder)
    model = tiny_llama()
    model.config.name_or_path = "somebody/tiny"
    moments_of(theirs, tiny_tokenizer, model).get(1)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_read_in_any_form(save: Callable[..., None], dtype: type, tmp_path: Path) -> None:
    """Compressed or not, in either order of rows and columns, over more rows than are read at a time."""
    keys = np.random.default_rng(0).standard_normal((TOKENS, 300))
    total = np.asfortranarray((keys.T @ keys).astype(dtype))
    moment = read_moment(publish(tmp_path / "a.npz", total, save=save), 300, torch.float32)
    assert torch.equal(moment, moment.T)
    torch.testing.assert_close(moment, torch.from_numpy(total / TOKENS).float())


def test_names_of_files(tmp_path: Path) -> None:
    module = MODULE.format(1)
    names = {
        f"{module}_float32_mom2_100000.npz": ("float32", 100000),
        f"{module}_float64_mom2.npz": ("float64", None),
        f"{module}_float16_mean-mom2-norm_mean_t{{batch_tokens}}_50.npz": ("float16", 50),
        f"{module}_float32_mom2_t512_50.npz": ("float32", 50),
        f"{module}_float32_mean_50.npz": None,
        f"{MODULE.format(11)}_float32_mom2_50.npz": None,
        f"{module}_float32_mom2_50.npz.part": None,
    }
    for name in names:
        (tmp_path / "wikipedia_stats").mkdir(exist_ok=True)
        (tmp_path / "wikipedia_stats" / name).touch()
    found = {file.path.name: (file.dtype, file.samples) for file in published_files(tmp_path, module)}
    assert found == {name: about for name, about in names.items() if about}
    assert {file.dataset for file in published_files(tmp_path, module)} == {"wikipedia"}


def spoilt(kind: str, path: Path, total: np.ndarray) -> None:
    """A file that cannot be used, of one kind or another."""
    if kind == "cut":
        publish(path, total)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "flipped":
        publish(path, total)
        data = bytearray(path.read_bytes())
        data[data.index(b"mom2.mom2.npy") + 1000] ^= 64
        path.write_bytes(data)
    elif kind == "text":
        path.write_text("not found")
    elif kind == "object":
        publish(path, np.array([{"a": 1}], dtype=object))
    elif kind == "shape":
        publish(path, total[:40, :40])
    elif kind == "half":
        publish(path, np.triu(total))
    elif kind == "nan":
        publish(path, np.where(np.eye(len(total)) > 0, np.nan, total))
    elif kind == "indefinite":
        values, vectors = np.linalg.eigh(total)
        publish(path, total - 1.5 * values[-5] * np.outer(vectors[:, -5], vectors[:, -5]))
    else:
        publish(path, total, **{"count": {"count": 0}, "no count": {"count": None}, "mean": {
            "mom2.constructor": "util.runningstats.Mean()"}}[kind])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut", "cannot be used"),
        ("flipped", "cannot be used .*CRC"),
        ("text", "cannot be used .*not a zip file"),
        ("object", "cannot be used"),
        ("shape", r"cannot be used \(its shape is \(40, 40\), the module's keys have 48 values"),
        ("count", "its mom2.count is 0"),
        ("no count", "it has no array mom2.count"),
        ("mean", r"written by util.runningstats.Mean\(\)"),
        ("half", "is no second moment .it is not symmetric"),
        ("nan", "is no second moment .its diagonal is not finite"),
        ("indefinite", "is no second moment .(it is not positive semidefinite|an entry|its diagonal)"),
    ],
)
def test_what_is_no_second_moment_is_refused(
    kind: str, says: str, own: dict[int, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    spoilt(kind, path, (own[1].double() * TOKENS).numpy())
    with pytest.raises(SphereError, match=says) as refused:
        read_moment(path, 48, torch.float32)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_extreme_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))
    values = torch.linspace(0, 1, 200, dtype=torch.float64)
    values[0], values[-1] = -0.5, 7
    found = extreme_eigenvalues((basis * values) @ basis.T)
    assert found == pytest.approx((-0.5, 7), abs=1e-6)
    assert extreme_eigenvalues(torch.eye(3)) == pytest.approx((1, 1))


@pytest.mark.usefixtures("computing_is_an_error")
def test_what_another_model_may_have_computed(
    own: dict[int, Tensor],
    theirs: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A factor that no corpus makes is refused; what is merely unlike gets one warning."""
    caplog.set_level(logging.WARNING, "sphere")
    moments_of(theirs, tiny_tokenizer).get(1)
    assert not caplog.records
    file = theirs / PLACE / f"{MODULE.format(1)}_float32_mom2_8.npz"
    publish(file, own[1] * TOKENS * 20)
    moments_of(theirs, tiny_tokenizer).get(1)
    assert len(caplog.records) == 1
    assert re.search("may not be this model's: it is .* times", caplog.records[0].getMessage())
    publish(file, own[1] * TOKENS, count=1)
    with pytest.raises(SphereError, match="times what this model's keys give on a short text"):
        moments_of(theirs, tiny_tokenizer).get(1)


def test_a_place_that_was_named_must_hold_them(
    theirs: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def said(place: Path) -> str:
        with pytest.raises(SphereError) as refused:
            moments_of(tmp_path / "none", tiny_tokenizer, stats_from=place).get(1)
        assert refused.value.arguments == ("stats_from",)
        return str(refused.value)

    files = sorted((theirs / PLACE).glob("*.npz"))
    assert "There is nothing at" in said(tmp_path / "nowhere")
    assert "is one file, and layers [1, 2] are edited" in said(files[0])
    double = theirs / "more" / PLACE / files[0].name
    double.parent.mkdir(parents=True)
    double.write_bytes(files[0].read_bytes())
    assert "2 of them fit alike" in said(theirs)
    files[1].unlink()
    assert "it holds none" in said(theirs / PLACE)


def test_a_run_that_is_continued_finds_them_again(
    own: dict[int, Tensor], theirs: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    world = TinyRun(tmp_path / "world", tiny_tokenizer, 4)
    config = world.config(alg_name="MEMIT", stats_from=str(theirs))
    run = execute(config)
    whole = contents(run.folder)
    (run.folder / "edit_4.safetensors").unlink()
    again = execute(world.config(alg_name="MEMIT", stats_from=str(theirs), continue_from_run=True))
    assert contents(again.folder).keys() <= whole.keys()
    with zipfile.ZipFile(sorted((theirs / PLACE).glob("*.npz"))[0]) as archive:
        assert "mom2.mom2.npy" in archive.namelist()
    for layer, moment in own.items():
        publish(theirs / PLACE / f"{MODULE.format(layer)}_float32_mom2_8.npz", moment * 2 * TOKENS)
    with pytest.raises(SphereError, match="begun with other second moments than those of today"):
        execute(world.config(alg_name="MEMIT", stats_from=str(theirs), continue_from_run=True))
