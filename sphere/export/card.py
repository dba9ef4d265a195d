"""README.md of an export: what was edited, how, with which scores, from which model and under which licence.

Knows what a run's folder holds. Knows nothing of how weights are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere.embedded import EMBEDDED
from sphere.errors import SphereError
from sphere.evaluation.summary import format_table
from sphere.export.edited import EditedRun
from sphere.files import read_json
from sphere.models import model_label
from sphere.runs.remake import CONTINUED, commands_of

TAGS = ("knowledge-editing", "sphere")
SHOWN_FACTS = 10
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENCE_LINE = re.compile(r"^license:\s*(\S.*?)\s*$", re.MULTILINE)


def card(run: EditedRun, form: str, made: Sequence[str], checked: Sequence[str], usage: str) -> str:
    """The text of a model card.

    Args:
        form: what it is, in a few words.
        made: sentences on what was written.
        checked: sentences on how it compares with the edited model.
        usage: how it is loaded, as Markdown.
    """
    label = model_label(run.model_name)
    sections = [
        _front_matter(run),
        f"# {label}, edited" if run.n_edits else f"# {label}",
        "\n\n".join([f"{_what(run)}, as {form}.", *made]),
        f"## Use\n\n{usage}",
        "## Compared with the edited model\n\n" + "\n\n".join([*checked, *run.notes]),
    ]
    if run.n_edits:
        sections += [_how(run), _facts(run), _scores(run)]
    sections.append(_base(run))
    return "\n\n".join(section for section in sections if section) + "\n"


def licence_of(model_name: str) -> str | None:
    """The licence of a model as it says itself: that of an embedded one, or of the card in its folder."""
    if model_name in EMBEDDED:
        return EMBEDDED[model_name].licence
    path = Path(model_name)
    readme = (path if path.is_dir() else path.parent) / "README.md"
    text = readme.read_text("utf-8", errors="replace") if path.exists() and readme.is_file() else ""
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = LICENCE_LINE.search(front)
    return found[1] if found else None


def _front_matter(run: EditedRun) -> str:
    lines = ["---"]
    if HUB_ID.fullmatch(run.model_name) and not Path(run.model_name).exists():
        lines.append(f"base_model: {run.model_name}")
    licence = licence_of(run.model_name)
    if licence and re.fullmatch(r"[\w.-]+", licence):
        lines.append(f"license: {licence.lower()}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---"])


def _what(run: EditedRun) -> str:
    label = model_label(run.model_name)
    if not run.n_edits:
        return f"{label}, unedited"
    return f"{label} after {run.n_edits} edits{_source(run.config, run.n_edits)}"


def _source(config: Mapping[str, Any], n_edits: int) -> str:
    """Where the first so many edits come from; settings name the last table only, whatever was edited before it."""
    added = [Path(one["facts"]).name for one in config.get(CONTINUED, ()) if one["n_edits"] < n_edits]
    if added:
        return f", the last of them from {added[-1]} (the commands below name all tables)"
    data = None if config.get(CONTINUED) else config.get("facts") or config.get("ds_name")
    return f" from {Path(str(data)).name}" if data else ""


def _how(run: EditedRun) -> str:
    config = run.config
    rows = [("method", config.get("alg_name", "not known"))]
    rows += [
        (key, config[key]) for key in ("num_edits", "beta_hse", "alpha", "rules", "seed") if config.get(key)
    ]
    rows.append(("weights", ", ".join(run.edited)))
    rows += [(f"version of {name}", version) for name, version in config.get("versions", {}).items()]
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])
    commands = commands_of(config, run.folder) if "alg_name" in config else []
    return "\n\n".join(["## How it was edited", table, *(f"    {command}" for command in commands)])


def _facts(run: EditedRun) -> str:
    records = run.records()
    if not records:
        return ""
    shown = [
        f"- {record.request.text} **{record.request.target_new.strip()}**" for record in records[:SHOWN_FACTS]
    ]
    more = f"\n\nand {len(records) - SHOWN_FACTS} more." if len(records) > SHOWN_FACTS else ""
    return "## What was edited\n\n" + "\n".join(shown) + more


def _scores(run: EditedRun) -> str:
    rows = [row for row in _summary(run.folder) if row.get("n_edits") in (0, run.n_edits)]
    if not any(row.get("n_edits") == run.n_edits for row in rows):
        return "## Scores\n\nThis checkpoint has not been scored (`sphere score`)."
    return "## Scores\n\nAs `sphere score` measured them.\n\n" + format_table(rows, markdown=True)


def _summary(folder: Path) -> list[dict[str, Any]]:
    path = folder / "summary" / "summary.json"
    try:
        content = read_json(path, "summary") if path.exists() else {}
        return list(content.get("checkpoints", []))
    except (SphereError, AttributeError, TypeError):
        return []  # scores are an extra


def _base(run: EditedRun) -> str:
    licence = licence_of(run.model_name)
    stated = f"Its licence: {licence}." if licence else "Its files state no licence that could be read here."
    name = model_label(run.model_name) if Path(run.model_name).exists() else run.model_name
    return (
        f"## Base model and licence\n\nMade from `{name}`. {stated} The base model's licence holds for what was made "
        "from it."
    )
