"""Writing files so that a kill, a full disk or a power cut never leaves half of one.

Knows about paths and bytes only, nothing of models or runs.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sphere.errors import SphereError

LEFTOVER = ".part"  # ends the name of a file that is being written
_TEMPORARY = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(LEFTOVER)}")  # as `tempfile` completes it


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is moved over `path`, on failure removed.

    Bytes and name are on the disk when the block is left: what is written later never outlives what was written before.

    Raises:
        SphereError: the file cannot be written (no space, no permission); whatever stood at `path` is kept.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=LEFTOVER)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; these are ordinary results
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        if isinstance(error, OSError) or _is_io_error(error):
            raise _cannot_write(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which gets that name when the block is left; on failure nothing is left.

    Raises:
        SphereError: there is something at `path` already, before or after; or the folder cannot be written (no space,
            no permission).
    """
    path = Path(os.path.abspath(path))
    _check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=LEFTOVER))
    except OSError as error:
        raise SphereError(f"Cannot write {path}: {error}; choose another folder.") from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders private, and some writers their files
        for written in sorted(temporary.rglob("*")):
            written.chmod((0o777 if written.is_dir() else 0o666) & ~umask)
            _sync(written)
        _check_new(path)
        os.rename(temporary, path)
        _sync(path.parent)
    except Exception as error:
        if isinstance(error, OSError) or _is_io_error(error):
            raise SphereError(str(_cannot_write(path, error))) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise SphereError(
            f"There is something at {path} already, which is never written over: choose another place."
        )


def check_space(folder: Path, n_bytes: int) -> None:
    """Find out that a disk is too full before the time goes into what is to be written to it.

    Raises:
        SphereError: less than `n_bytes` are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise SphereError(
            f"{n_bytes / 1e9:.2f} GB are to be written to {folder.parent}, where {free / 1e9:.2f} GB are free: free "
            "some space or choose another folder."
        )


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; it is on the disk when the call returns. A kill can leave a part of the last line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_leftover(name: str) -> bool:
    """Whether a file has a name that `atomic_path` gives while it is being written."""
    return bool(_TEMPORARY.fullmatch(name))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers, from a folder that nobody else is writing to."""
    for path in Path(folder).glob(f".*{LEFTOVER}"):
        if is_leftover(path.name):
            path.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Give a file the name of another, in the same folder; on the disk when the call returns."""
    os.replace(source, target)
    _sync(target.parent)


def remove_files(folder: Path, paths: Iterable[str]) -> None:
    """Remove files, and the subfolders that are empty without them; gone from the disk when the call returns.

    Args:
        paths: relative to `folder`; those that are gone already are no error.
    """
    places = set()
    for name in paths:
        path = Path(folder, name)
        path.unlink(missing_ok=True)
        places |= {parent for parent in path.parents if parent.is_relative_to(folder) and parent.is_dir()}
    for place in sorted(places, reverse=True):  # the inner ones first
        if place != Path(folder):
            remove_leftovers(place)
        _sync(place)
        if place != Path(folder) and not any(place.iterdir()):
            place.rmdir()


def _sync(path: Path) -> None:
    """Have the operating system put a file's bytes, or a folder's names, on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_io_error(error: Exception) -> bool:
    """safetensors reports a full disk as its own error with the operating system's text in it."""
    return type(error).__name__ == "SafetensorError" and "os error" in str(error).lower()


def _cannot_write(path: Path, error: Exception) -> SphereError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    advice = "free some space" if full else "check the path and its permissions"
    return SphereError(
        f"Cannot write {path}: {error}; {advice} or choose another folder; nothing was left half-written.",
        argument=("output_dir", "data_dir"),
    )


def check_writable(folder: Path) -> None:
    """Find out that a folder cannot be made or written to before hours of work go into its files.

    Raises:
        SphereError: it cannot.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "it may not be written to" if there.is_dir() else "it is a file"
        raise SphereError(
            f"Cannot write into {folder}, because of {there} ({reason}): choose another folder.",
            argument="output_dir",
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; `what` names it in errors, e.g. "hyperparameter file".

    Raises:
        SphereError: the file is missing or not JSON.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise SphereError(f"No {what} at {path}: check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SphereError(f"Cannot read the {what} {path}: {error}.") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SphereError(
            f"The {what} {path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})."
        ) from error
