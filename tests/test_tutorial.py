"""The commands of the tutorial, as its page says them, on the default model: `make tutorial`, ten minutes on a CPU."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sphere.commands import main
from sphere.data.facts import read_facts, repeated

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial/index.md").read_text("utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    sphere (.+)$", PAGE, re.MULTILINE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the commands have been run, one after the other."""
    place = tmp_path_factory.mktemp("tutorial")
    (place / "docs").symlink_to(ROOT / "docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in COMMANDS:
            assert main.main(words) == 0, words
    return place


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
