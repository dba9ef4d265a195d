"""The README and the pages in docs/: what they link to, name and call exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from sphere.commands import main
from sphere.report.comparison import HOOK
from sphere.runs.config import settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "data" / "README.md",
    ROOT / "Edited_Weight" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
COMMANDS = [name for name in main.COMMANDS if name != "sweep"]  # those with flags; `sweep` takes key=value
LINK = re.compile(r"\]\(([^()\s]+)\)")
MODULE = re.compile(r"python3? -m ([\w.]+)")
TARGET = re.compile(r"(?:^ {4}|`)make ((?:[a-z]+ ?)+)", re.MULTILINE)
SUBCOMMAND = re.compile(r"(?:^ {4}|`)sphere (\w+)", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--([a-z]\w+)")
# `path/to/file.py`, and `path/to/file.py::Name.attribute`
SOURCE = re.compile(
    r"`((?:sphere|baselines|experiments|scripts|benchmarks|tests|hparams|data|docs)/[\w./-]*)(?:::([\w.]+))?`"
)
# Flags of other programs that the pages name.
FOREIGN = {"no", "nproc_per_node", "launcher", "lora"}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The text without its code blocks, in which brackets and parentheses are no links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def definitions(path: Path) -> dict[str, set[str]]:
    """Name of a class or function in a module -> names in it: methods, attributes and fields."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = set()
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: set() for target in targets if isinstance(target, ast.Name)}
    return found


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text("utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@cache
def known_flags() -> set[str]:
    """Flags of all commands, as their help says, and of benchmarks and scripts, as they stand there."""
    found: set[str] = set()
    for name in COMMANDS:
        found |= set(FLAG.findall(importlib.import_module(f"sphere.commands.{name}").parser().format_help()))
    for folder in ("benchmarks", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            found |= set(re.findall(r'"--(\w+)"', path.read_text("utf-8")))
    return found


def test_the_readme_fits_one_page():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path):
    for link in LINK.findall(without_code(page.read_text("utf-8"))):
        if link.startswith(("https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page_id(page)} links to {link}"
        if anchor:
            assert anchor in anchors(path), f"{page_id(page)} links to {link}, which has no such heading"
        if DOCS in page.parents:
            assert path.is_relative_to(DOCS), f"{page_id(page)} links to {link}, which is not built"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path):
    text = page.read_text("utf-8")
    for module in MODULE.findall(text):
        spec = importlib.util.find_spec(module.rstrip("."))
        assert spec is not None, f"{page_id(page)} runs {module}"
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), (
                f"{page_id(page)} runs the package {module}"
            )
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for words in TARGET.findall(text):
        for word in words.split():
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"{page_id(page)} names make {word}"
    for name in SUBCOMMAND.findall(text):
        assert (ROOT / "sphere" / "commands" / f"{name}.py").exists(), f"{page_id(page)} names sphere {name}"


def test_lists_of_settings_are_whole():
    commands, measuring = ((DOCS / f"{name}.md").read_text("utf-8") for name in ("commands", "measuring"))
    assert [name for name in settings() if f"`--{name}`" not in commands] == []
    named = re.search(r"settings but for the hook and\s+the rules \(([^)]*)\)", measuring)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == set(HOOK)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_exist(page: Path):
    unknown = set(FLAG.findall(page.read_text("utf-8"))) - known_flags() - FOREIGN
    assert not unknown, f"{page_id(page)} names flags that no command has"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_and_functions_exist(page: Path):
    for file, name in SOURCE.findall(page.read_text("utf-8")):
        path = ROOT / file
        if file.startswith("data/") and not path.exists():
            assert re.search(r"stats|cache|self_text", file), f"{page_id(page)} names {file}"
            continue
        assert path.exists(), f"{page_id(page)} names {file}"
        if name:
            outer, _, inner = name.partition(".")
            found = definitions(path)
            assert outer in found, f"{page_id(page)} names {file}::{name}"
            assert not inner or inner in found[outer], f"{page_id(page)} names {file}::{name}"


def test_every_page_of_a_method_names_what_holds_its_equation():
    for page in sorted((DOCS / "methods").glob("*.md")):
        named = [name for _, name in SOURCE.findall(page.read_text("utf-8")) if name]
        assert len(named) >= 2, f"{page_id(page)} names no functions"


def test_every_page_is_in_the_navigation():
    def pages(entries: list) -> list[str]:
        nested = [e if isinstance(e, str) else pages(next(iter(e.values()))) for e in entries]
        return [p for e in nested for p in ([e] if isinstance(e, str) else e)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    assert sorted(pages(navigation)) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
    assert all((DOCS / page).exists() for page in pages(navigation))


def test_figures_are_those_of_their_tables(tmp_path: Path):
    from scripts.draw_figures import DRAWINGS, draw

    for drawn in DRAWINGS:
        draw(drawn, (DOCS / "results.md").read_text("utf-8"), tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").read_bytes() == (DOCS / "figures" / f"{drawn.name}.svg").read_bytes()


def test_the_table_of_the_readme_is_that_of_the_results():
    rows = [
        line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| MEMIT")
    ]
    results = (DOCS / "results.md").read_text("utf-8").splitlines()
    assert rows
    assert all(row in results for row in rows)
