"""One process at a time in a run's folder: editing, continuing and scoring write the same files.

    <folder>/.lock          what is locked; stays behind and means nothing by itself
    <folder>/.lock.json     which process holds it, to be named to the others

The lock is the operating system's: it goes with the process that holds it, however that ends. Reading needs none.
Knows nothing of what a run is.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from sphere.distributed import Processes
from sphere.errors import SphereError
from sphere.files import check_writable

LOCK_NAME = ".lock"
HOLDER_NAME = ".lock.json"


class FolderInUseError(SphereError):
    """Another process (or another thread of this one) holds the folder."""


@contextmanager
def locked(folder: str | Path, processes: Processes | None = None) -> Iterator[None]:
    """Within the block no other process is at this folder. The thread that holds it may take it again.

    The folder is made where there is none, and removed again if nothing was put into it.

    Args:
        processes: those that do the same job; the main one takes the lock for all of them.

    Raises:
        FolderInUseError: another process holds it; the sentence names that process.
        SphereError: the folder cannot be written to.
    """
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(_alone(Path(folder)))

        (processes or Processes()).on_main(take)
        yield


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    check_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(
        folder / LOCK_NAME, timeout=0, is_singleton=True
    )  # one per path and thread: may be taken again
    again = lock.is_locked
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"{folder} is in use by {_holder(folder)}: wait until that has ended."
        ) from None
    holder = folder / HOLDER_NAME
    try:
        if not again:
            holder.write_text(json.dumps(_this_process()), "utf-8")
        yield
    finally:
        if not again:
            holder.unlink(missing_ok=True)
            _remove_if_unused(folder, made)
        lock.release()


def _this_process() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _holder(folder: Path) -> str:
    """The process that holds a folder, in words."""
    try:
        who = json.loads((folder / HOLDER_NAME).read_text("utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']} ({who['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is just beginning or ending
        return "another process"


def _remove_if_unused(folder: Path, made: list[Path]) -> None:
    """Leave no folder behind in which nothing was written."""
    if folder in made and [path.name for path in folder.iterdir()] == [LOCK_NAME]:
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
            for path in made:
                path.rmdir()
