"""The wheel: what it carries, and that it works from an empty folder outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds, of each process


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel built from this checkout, unpacked."""
    pytest.importorskip(
        "setuptools", "77", "setuptools 77 or newer, which builds the wheel, is not installed"
    )
    place = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: which files are the project's own is not known")
    source = place / "source"
    for name in tracked.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(place),
    ]
    subprocess.run([*build, str(source)], check=True, capture_output=True, timeout=TIMEOUT)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(place / "site")
    return place / "site"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python process in `folder` that sees the unpacked wheel, and nothing of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def test_it_carries_what_the_library_needs_and_nothing_else(installed: Path) -> None:
    def below(top: str) -> set[str]:
        names = subprocess.run(["git", "ls-files", top], cwd=ROOT, capture_output=True, text=True, check=True)
        return {
            name
            for name in names.stdout.split("\n")
            if name.endswith((".json", ".txt", ".safetensors", ".yaml"))
        }

    carried = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    shipped = {name.removeprefix("sphere/shipped/") for name in carried if name.startswith("sphere/shipped/")}
    assert below("hparams") <= shipped
    assert below("data") <= shipped
    assert {"sphere/py.typed", "sphere/commands/sweep.yaml", "sphere/baselines/mend/method.py"} <= carried
    tops = {name.split("/")[0] for name in carried}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sphere"}
    assert not [name for name in carried if "/tests/" in name or "stats" in name.split("/")]


def test_it_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "__init__.py").write_text("raise SystemExit('foreign code ran')")
    done = run(installed, tmp_path, "-m", "sphere", "methods")
    assert done.returncode == 0, done.stderr
    assert "SmolLM2-135M  layers 4 5 6 7 8" in done.stdout
    assert "MEND" in done.stdout
    code = (
        "import sphere; from sphere.data import load_records;"
        "assert len(load_records('starter', limit=3)) == 3;"
        "h = sphere.load_hparams('hparams/MEMIT/SmolLM2-135M.json', sphere.get_method('MEMIT').hparams_class);"
        "print(sphere.__file__, h.layers)"
    )
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout


def test_a_reader_that_has_had_enough_is_no_error(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "sphere", "methods"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(TIMEOUT) == 141
