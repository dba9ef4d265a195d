"""docs/adding_a_method.md is true to the letter: its method is run as it stands there."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
from conftest import LLAMA_MODULES, REQUESTS, tiny_hparams, tiny_llama
from test_architectures import ARCHITECTURES, check_behaviour
from test_registry import install
from tiny_run import TinyRun
from transformers import PreTrainedTokenizerBase

from sphere import Editor, HParams
from sphere.methods import EditedModel, Services, available_methods
from sphere.runs.plan import plan_run
from sphere.runs.run import execute
from sphere.values.compute_ks import ActivationsPass

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text("utf-8")
SOURCE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
ENTRY = re.search(r"^MeanShift = .*$", PAGE, re.MULTILINE)[0]


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's method in a package with the page's entry point."""
    module = re.search(r'"([\w.]+):', ENTRY)[1]
    package, _, name = module.partition(".")
    folder = tmp_path / "site-packages"
    (folder / package).mkdir(parents=True)
    (folder / package / f"{name}.py").write_text(SOURCE, "utf-8")
    install(folder, "unused", "", ENTRY.replace('"', ""), monkeypatch)
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("beta_hse", [0.0, 0.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_method_of_the_page_behaves_as_every_other(
    architecture: str, beta_hse: float, tmp_path: Path
) -> None:
    assert "MeanShift" in available_methods()
    check_behaviour(architecture, "MeanShift", beta_hse, tmp_path)


@pytest.mark.usefixtures("registered")
def test_the_method_of_the_page_is_planned_and_run(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    world = TinyRun(tmp_path / "world", tiny_tokenizer, 4)
    source = world.folder / "hparams" / "MEMIT" / "tiny.json"
    (world.folder / "hparams" / "MeanShift").mkdir()
    (world.folder / "hparams" / "MeanShift" / "tiny.json").write_text(source.read_text())
    config = world.config(alg_name="MeanShift")
    assert "all layers' updates" in [item.what for item in plan_run(config).items]
    assert execute(config).editor.n_edits == 4


def test_a_class_is_handed_to_the_editor(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert "Editor(model, tokenizer, MeanShift, hparams)" in PAGE
    namespace: dict[str, type] = {}
    exec(SOURCE, namespace)
    hparams = tiny_hparams(LLAMA_MODULES, HParams)
    editor = Editor(tiny_llama(), tiny_tokenizer, namespace["MeanShift"], hparams, progress=False)
    assert set(editor.edit(REQUESTS).layers) == set(editor.weights.names)


def test_files_and_names_of_the_page_exist() -> None:
    for path in re.findall(r"`((?:sphere|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / path).is_file(), path
    section = PAGE.partition("## What a method works with")[2].partition("\n## ")[0]
    edited, services = section.split("`self.services`")
    for text, kind in ((edited, EditedModel), (services, Services)):
        known = (
            {field.name for field in dataclasses.fields(kind)} | set(dir(kind)) | set(dir(ActivationsPass))
        )
        names = set(re.findall(r"`(\w+)[`(]", text))
        assert len(names) > 4
        assert names <= known
