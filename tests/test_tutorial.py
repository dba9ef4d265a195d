"""The tutorial: its page and its notebook say the same, and do it on the default model (`make tutorial`)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.build_notebook import NOTEBOOK, PAGE, content, notebook
from sphere.data.facts import read_facts, repeated

ROOT = Path(__file__).parents[1]
COMMANDS = [
    shlex.split(line) for line in re.findall(r"^    sphere (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
]
SECONDS = 1800  # that no cell may take


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the notebook has been run, from its first cell to its last."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel (requirements-dev.txt)")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat (requirements-dev.txt)")
    place = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(NOTEBOOK.parent, place / "docs" / "tutorial")
    command = place / "bin" / "sphere"  # as an installed package has it
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m sphere "$@"\n')
    command.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(command.parent), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        cells = nbformat.read(NOTEBOOK, as_version=4)
        where = {"metadata": {"path": str(place / "docs" / "tutorial")}}
        nbclient.NotebookClient(cells, timeout=SECONDS, resources=where).execute()
    nbformat.write(cells, place / "executed.ipynb")
    return place


def test_the_notebook_is_that_of_the_page() -> None:
    assert NOTEBOOK.read_text("utf-8") == content(), "make it again: python -m scripts.build_notebook"
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat (requirements-dev.txt)")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


def test_commands_and_python_of_a_page_are_cells_that_run() -> None:
    page = "# Title\n\nText.\n\n    a,b\n\n## One\n\n    sphere check a\n    sphere edit\n\nMore.\n\n"
    page += "```python\nx = 1\n```\n"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(page)["cells"]]
    assert cells[0][1].startswith("# Title\n\nMade from")
    assert cells[1:] == [
        ("code", "%cd ../.."),
        ("markdown", "Text.\n\n    a,b\n\n## One"),
        ("code", "%%bash\nsphere check a\nsphere edit"),
        ("markdown", "More."),
        ("code", "x = 1"),
    ]


def test_its_table_of_facts_is_good() -> None:
    facts = read_facts(str(ROOT / "docs/tutorial/facts.csv"))
    assert len(facts.records) == 20
    assert not facts.bad
    assert not repeated(facts)


@pytest.mark.slow
def test_five_commands_make_a_model_that_knows_the_facts(place: Path) -> None:
    assert [words[0] for words in COMMANDS] == ["check", "edit", "ask", "score", "export"]
    (summary,) = place.glob("tutorial/*/*/*/summary/summary.json")
    before, after = (row["metrics"] for row in json.loads(summary.read_text("utf-8"))["checkpoints"])
    assert after["efficacy_success"]["mean"] >= max(90, before["efficacy_success"]["mean"])
    assert after["paraphrase_success"]["mean"] > before["paraphrase_success"]["mean"]


@pytest.mark.slow
def test_the_export_says_so_in_plain_transformers(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "edited-model")
    tokenizer = AutoTokenizer.from_pretrained(place / "edited-model")
    ids = tokenizer("The football club of Kylian Mbappé is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    new, true = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (" Real", " Paris"))
    assert logits[new] > logits[true]


@pytest.mark.slow
def test_the_python_of_the_notebook_says_what_changed(place: Path) -> None:
    cells = json.loads((place / "executed.ipynb").read_text("utf-8"))["cells"]
    last = [cell for cell in cells if cell["cell_type"] == "code"][-1]
    said = ["".join(out["text"]) for out in last["outputs"] if out.get("name") == "stdout"]
    states = dict(
        line.split(" ", 1) for line in "".join(said).splitlines() if line.startswith(("unedited", "edited"))
    )
    assert states["edited"].startswith(" Real Madrid")
    assert not states["unedited"].startswith(" Real Madrid")
