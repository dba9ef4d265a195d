"""Settings and keys of run.json: as earlier versions called them, as they are called today. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"z_products": "z_matmul_dtype"}


def by_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, as any version of this project wrote them, by the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in config.items()}
