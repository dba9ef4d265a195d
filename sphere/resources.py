"""What is shipped with the package, and where it lies: hyperparameter files, the starter set.

In a checkout `hparams/` and `data/` lie beside the package; an installed package holds them in `sphere/shipped/`.
Knows paths, and imports nothing of this package.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = ("hparams", "data")


def shipped(path: str | Path) -> Path:
    """Where `path`, which begins with "hparams" or "data", lies among what is shipped; it need not be there."""
    package = Path(__file__).parent
    installed = package / "shipped"
    return (installed if installed.is_dir() else package.parent) / path


def places(path: str | Path) -> tuple[Path, ...]:
    """Where a file is looked for: at `path`, then, if that begins with "hparams" or "data", in the package."""
    path = Path(path)
    return (path, shipped(path)) if path.parts and path.parts[0] in SHIPPED else (path,)


def find(path: str | Path) -> Path:
    """The first of the `places` of `path` that is there; `path` itself where none is.

    So "hparams/AlphaEdit/SmolLM2-135M.json" and "data/starter.json" are found from any working directory, and one's own
    files go before those that are shipped.
    """
    return next((place for place in places(path) if place.exists()), Path(path))
