"""One self-contained HTML page of figures, tables, commands and configurations.

Knows the template and how a figure becomes bytes. Knows nothing of how the numbers came about.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sphere.report.collect import RunData
from sphere.report.commands import downstream_command, edit_commands, missing, score_command
from sphere.report.figures import Drawn
from sphere.report.tables import Table

TEMPLATE = "page.html.j2"
PNG_DPI = 200
HIDDEN = ("case_ids", "templates")  # long; they are in run.json


@dataclass(frozen=True)
class Section:
    """A figure and the tables under it; either may be missing."""

    name: str
    title: str
    caption: str = ""
    image: str = ""  # SVG in base64
    width: int = 0  # CSS pixels
    height: int = 0
    tables: tuple[Table, ...] = ()


def svg(drawn: Drawn) -> bytes:
    """The figure as SVG; without a date, so that the same figure is the same bytes."""
    return _save(drawn, format="svg", metadata={"Date": None, "Title": drawn.title})


def png(drawn: Drawn) -> bytes:
    """The figure as PNG."""
    return _save(drawn, format="png", dpi=PNG_DPI, metadata={"Title": drawn.title})


def _save(drawn: Drawn, **options: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.figure.savefig(buffer, **options)
    return buffer.getvalue()


def sections(figures: Sequence[tuple[Drawn, bytes]], tables: Sequence[Table]) -> list[Section]:
    """Every figure with its tables; a table whose figure could not be drawn has a section of its own."""
    result = []
    for drawn, image in figures:
        width, height = (round(96 * inches) for inches in drawn.figure.get_size_inches())
        own = tuple(table for table in tables if table.section == drawn.name)
        encoded = base64.b64encode(image).decode()
        result.append(Section(drawn.name, drawn.title, drawn.caption, encoded, width, height, own))
    names = {section.name for section in result}
    for table in tables:
        if table.section and table.section not in names:
            result.append(Section(table.section, table.title, tables=(table,)))
            names.add(table.section)
    return result


def render(
    runs: Sequence[RunData], figures: Sequence[tuple[Drawn, bytes]], tables: Sequence[Table], own_command: str
) -> str:
    """The page.

    Args:
        figures: with their SVG.
        own_command: the command that makes the page again.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title="Knowledge editing: " + (runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"),
        lead=_lead(runs),
        opening=[table for table in tables if not table.section],
        sections=sections(figures, tables),
        missing=missing(runs),
        runs=[_described(run) for run in runs],
        own_command=own_command,
    )


def _lead(runs: Sequence[RunData]) -> str:
    models = " and ".join(dict.fromkeys(run.model for run in runs))
    datasets = " and ".join(dict.fromkeys(str(run.config.get("ds_name", "unknown data")) for run in runs))
    edits = [run.n_edits for run in runs]
    count = f"{min(edits)}" if min(edits) == max(edits) else f"{min(edits)} to {max(edits)}"
    return f"{count} sequential edits of {models}. Dataset: {datasets}."


def _described(run: RunData) -> dict[str, Any]:
    shown = {key: value for key, value in run.config.items() if key not in HIDDEN}
    commands = edit_commands(run)
    commands += [score_command(run)] if run.summary else []
    commands += [downstream_command(run)] if run.downstream else []
    return {
        "label": run.label,
        "folder": str(run.folder),
        "commands": commands,
        "configuration": json.dumps(shown, indent=2, ensure_ascii=False),
    }
