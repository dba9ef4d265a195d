"""The project's control prompts: questions of common knowledge whose answers no edit should touch.

Knows a file. Knows nothing of models.
"""

from __future__ import annotations

from sphere.files import read_json
from sphere.resources import shipped

CONTROLS = "data/control_prompts.json"


def control_prompts() -> list[tuple[str, str]]:
    """(prompt, answer) of each, in the file's order."""
    return [(entry["prompt"], entry["answer"]) for entry in read_json(shipped(CONTROLS), "control prompts")]
