"""The benchmarks run, at sizes that take no time, and say what they measured; no test asserts a time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import alphaedit_solve, memit_solve, principal_directions
from benchmarks.__main__ import write_section
from benchmarks.common import (
    Row,
    benchmark_parser,
    compare,
    device_of,
    finish,
    peak_of,
    read_rows,
    relative,
    table,
)
from sphere import SphereError

CPU = torch.device("cpu")


def a_row(**changes) -> Row:
    values = {"name": "solve", "sizes": "in 8", "plain_seconds": 2.0, "fast_seconds": 0.1, "difference": 1e-6}
    return Row(**(values | changes))


def test_compare_takes_turns_and_puts_things_back():
    calls: list[str] = []
    row = compare(
        "x",
        "1",
        lambda: calls.append("plain") or 2.0,
        lambda: calls.append("fast") or 2.5,
        difference=lambda fast, plain: fast - plain,
        before=lambda: calls.append("before"),
        turns=2,
        goal=3,
        note=lambda fast: f"{len(fast.seconds)} turns",
    )
    timed = calls[-8:]
    assert timed == ["before", "plain", "before", "fast"] * 2
    assert (row.difference, row.goal, row.note) == (0.5, 3, "2 turns")
    assert row.plain_seconds > 0
    assert row.fast_seconds > 0


def test_peak_memory_counts_what_is_freed_again():
    peak = peak_of(lambda: torch.ones(64 * 2**20, dtype=torch.uint8).max(), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 * 2**20 < peak < 160 * 2**20


def test_rows_survive_their_file(tmp_path):
    args = benchmark_parser("").parse_args(["--json", str(tmp_path / "rows.json")])
    rows = [a_row(goal=10), a_row(name="other", plain_bytes=2**22, fast_bytes=2**20, note="tokens")]
    assert finish(rows, args) == 0
    assert finish([a_row(goal=100)], benchmark_parser("").parse_args([])) == 1  # a ratio of 20
    facts, found = read_rows(tmp_path / "rows.json")
    assert found == rows
    assert facts["torch"] == torch.__version__
    assert "| 20.0 |" in table(rows)
    assert "4 -> 1 MiB" in table(rows)


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(SphereError, match="--device"):
        device_of(benchmark_parser("").parse_args(["--device", "nowhere"]))


def test_relative_difference():
    assert relative(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])) == pytest.approx(0.5)


def test_a_run_replaces_its_own_section(tmp_path):
    path = tmp_path / "results.md"
    write_section(path, "GPU", "first\n")
    write_section(path, "CPU", "second\n")
    write_section(path, "GPU", "third\n")
    text = path.read_text("utf-8")
    assert text.index("## CPU\n\nsecond") < text.index("## GPU\n\nthird")
    assert "first" not in text
    assert text.count("# Benchmarks") == 1


@pytest.mark.parametrize(
    ("script", "flags", "bound"),
    [
        (principal_directions, ["--shape", "20", "30"], 1e-4),
        (principal_directions, ["--shape", "30", "20"], 1e-4),
        (alphaedit_solve, ["--inp", "64", "--n", "4", "--batch", "3"], 1e-4),
        (memit_solve, ["--inp", "64", "--n", "4", "--batches", "3"], 1e-8),
    ],
)
def test_scripts_run_at_small_sizes(script, flags, bound, tmp_path):
    path = tmp_path / "rows.json"
    assert script.main([*flags, "--turns", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert rows
    assert all(row["difference"] < bound for row in rows)


def test_warm_start_study_runs(capsys):
    assert principal_directions.main(["--shape", "20", "30", "--warm_start"]) == 0
    assert "steps from the earlier ones" in capsys.readouterr().out
