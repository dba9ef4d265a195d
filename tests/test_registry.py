"""Which methods there are: an explicit list and entry points; nothing that merely lies in the working directory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from sphere.errors import SphereError
from sphere.methods import Method, available_methods, get_method
from sphere.methods.memit import MEMIT
from sphere.methods.registry import BUILT_IN
from sphere.runs.method_list import describe_methods


def install(folder: Path, module: str, source: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install` leaves behind: a module, and metadata that names an entry point ("name = module:Class")."""
    (folder / f"{module}.py").write_text(source, "utf-8")
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sphere.methods]\n{entry}\n")
    monkeypatch.syspath_prepend(folder)


WORKING = """
from sphere.methods.memit import MEMIT

class Mine(MEMIT):
    name = "Mine"
    reference = "none"
"""


def test_a_foreign_package_of_the_same_name_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "baselines"
    (package / "mend").mkdir(parents=True)
    for path in (package / "__init__.py", package / "mend" / "__init__.py"):
        path.write_text("raise RuntimeError('foreign code was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "baselines"]:
        monkeypatch.delitem(sys.modules, name)
    assert available_methods()["MEND"] is get_method("MEND")
    assert set(available_methods()) >= set(BUILT_IN)
    assert not [name for name in sys.modules if name.partition(".")[0] == "baselines"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_method_s_name_is_its_key(name: str) -> None:
    assert get_method(name).name == name
    assert issubclass(get_method(name), Method)


def test_a_method_of_another_package_is_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "mine_a", WORKING, "Mine = mine_a:Mine", monkeypatch)
    method = get_method("Mine")
    assert issubclass(method, MEMIT)
    assert available_methods()["Mine"] is method
    assert list(available_methods()) == sorted([*BUILT_IN, "Mine"])
    assert "Mine\n    reference" in describe_methods()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("this is no Python", "SyntaxError"),
        ("", "AttributeError: .*Mine"),
        ("class Mine: pass", "no class that derives from sphere.methods.Method"),
        ("from sphere.methods import Method as Mine", "and has `updates`"),
        (WORKING.replace('"Mine"', '"Other"'), "its `name` is 'Other', its entry point 'Mine'"),
    ],
    ids=["raises", "import", "exit", "syntax", "missing", "no method", "abstract", "name"],
)
def test_a_broken_entry_point_is_one_warning(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = f"broken_{abs(hash(source))}"
    install(tmp_path, module, source, f"Mine = {module}:Mine", monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert set(available_methods()) == set(BUILT_IN)
    (record,) = [r for r in caplog.records if "Mine" in r.getMessage()]
    assert record.exc_info is None
    assert "\n" not in record.getMessage()
    assert f"The method 'Mine' of another package ({module}:Mine) cannot be used" in record.getMessage()
    with pytest.raises(SphereError, match=says):
        get_method("Mine")
    caplog.clear()
    assert get_method("AlphaEdit").name == "AlphaEdit"  # and whoever asks for another one hears nothing of it
    assert not caplog.records


def test_names_of_our_own_methods_are_not_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, "thief", "raise RuntimeError", "MEMIT = thief:MEMIT", monkeypatch)
    assert available_methods()["MEMIT"] is MEMIT
    assert "'MEMIT' of thief:MEMIT is left out" in caplog.text
    assert "thief" not in sys.modules


def test_an_unknown_method_names_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "mine_b", WORKING, "Mine = mine_b:Mine", monkeypatch)
    with pytest.raises(
        SphereError,
        match=r"Unknown method 'FOO': use one of AlphaEdit, BetaEdit, EMMET, ENCORE, FT.*Mine, NAS, ROME",
    ):
        get_method("FOO")
