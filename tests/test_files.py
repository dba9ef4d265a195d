"""Files are whole or not there: whatever stood there before stays until the new one is on the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sphere.errors import SphereError
from sphere.files import append_line, atomic_path, check_writable, read_json, remove_leftovers, write_json


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    assert read_json(path, "thing") == {"a": 1}
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text(f"{1 / 0}")
    assert read_json(path, "thing") == {"a": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must find the old file or the new one: sync the bytes, rename, sync the folder."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "bytes")
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_json(tmp_path / "file.json", 1)
    assert steps == ["bytes", "rename", "folder"]
    append_line(tmp_path / "log", "a line")
    assert steps[3:] == ["bytes"]


def test_ordinary_permissions(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", 1)
    (tmp_path / "plain").touch()
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("number", "advice"), [(28, "free some space"), (13, "check the path and its permissions")]
)
def test_errors_of_the_disk(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SphereError, match=f"Cannot write .*file.json.*{os.strerror(number)}; {advice}"):
        write_json(tmp_path / "file.json", 1)
    assert not list(tmp_path.iterdir())


def test_the_full_disk_of_safetensors_is_the_same_error(tmp_path: Path) -> None:
    """It reports what the operating system says as an error of its own."""
    reported = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SphereError, match=r"Cannot write .*No space left.*free some space"):
        fail_within(tmp_path / "a", reported)
    with pytest.raises(SafetensorError, match="no such tensor"):
        fail_within(tmp_path / "a", SafetensorError("no such tensor"))
    assert not list(tmp_path.iterdir())


def fail_within(path: Path, error: Exception) -> None:
    """Have the writing of a file break off."""
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_lines_are_added(tmp_path: Path) -> None:
    for number in range(3):
        append_line(tmp_path / "log", json.dumps(number))
    assert (tmp_path / "log").read_text() == "0\n1\n2\n"


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    (tmp_path / ".file.json.abc12_3x.part").touch()
    for name in ("file.json", ".film.part"):  # a download of the user's, not ours
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file.json", ".film.part"}


def test_reading_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(SphereError, match=r"No thing at .*nowhere: check the path"):
        read_json(tmp_path / "nowhere", "thing")
    path = tmp_path / "a"
    path.write_text('{"a": 1,\n}')
    with pytest.raises(SphereError, match=r"The thing .*a is not valid JSON \(line 2, column 1"):
        read_json(path, "thing")
    path.write_bytes(b"\xff\xff")
    with pytest.raises(SphereError, match="Cannot read the thing"):
        read_json(path, "thing")
    with pytest.raises(SphereError, match="Cannot read the thing"):
        read_json(tmp_path, "thing")


def test_writability_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SphereError, match=r"Cannot write into .*file \(it is a file\)"):
        check_writable(tmp_path / "file" / "a")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SphereError, match="it may not be written to"):
        check_writable(tmp_path / "a")
    tmp_path.chmod(0o700)
