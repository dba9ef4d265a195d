"""Folders of files that take long to make, kept in the user's cache: made once, whole or not at all, checked when used.

    $XDG_CACHE_HOME/sphere/... (or ~/.cache/sphere/...), as PyTorch's and the model hub's caches

Knows paths and bytes, nothing of what is kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from sphere.embedded import file_sha256
from sphere.errors import SphereError
from sphere.files import check_writable, write_json

log = logging.getLogger(__name__)

LIST = "kept.json"  # name -> SHA-256 of the other files
PATIENCE = 3600  # seconds that another process is waited for


def cache_folder() -> Path:
    """The folder of this project in the user's cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sphere"


def kept_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, made where it is not there or not as it was made.

    Args:
        name: says all that decides its content.
        make: writes the files, none of them in subfolders, into an empty folder.

    Raises:
        SphereError: the cache cannot be written to, or another process does not finish what it is making.
    """
    folder = cache_folder() / name
    if _intact(folder):
        return folder
    try:
        check_writable(folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{name}.lock", timeout=PATIENCE)
        with lock:
            if not _intact(folder):
                _make(folder, make)
    except Timeout:
        raise SphereError(f"Another process has been making {folder} for an hour: end it.") from None
    except OSError as error:
        raise _no_cache(folder, error) from error
    except SphereError as error:
        if "output_dir" in error.arguments:  # of files that could not be written
            raise _no_cache(folder, error) from error
        raise
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder beside its place, and move it there; what a killed process left is removed."""
    beginning = f".{folder.name}.making."
    for leftover in folder.parent.glob(f"{beginning}*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=beginning) as temporary:
        made = Path(temporary, folder.name)
        made.mkdir()
        make(made)
        write_json(made / LIST, {path.name: file_sha256(path) for path in sorted(made.iterdir())})
        if folder.exists():
            log.warning("%s is damaged, and was made anew.", folder)
            shutil.rmtree(folder)
        made.rename(folder)


def _intact(folder: Path) -> bool:
    """Whether a folder holds what was made, bit for bit."""
    try:
        files = json.loads((folder / LIST).read_text("utf-8"))
        return all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def _no_cache(folder: Path, error: Exception) -> SphereError:
    return SphereError(
        f"Cannot keep {folder.name} in {folder.parent} ({error}): let the environment variable XDG_CACHE_HOME name a "
        "folder that can be written to and has space."
    )
