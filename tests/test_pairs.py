"""Which runs of a report are compared fact by fact, with which one, and where the differences stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_runs import fake_run

from sphere.commands.report import main
from sphere.errors import SphereError
from sphere.evaluation.case_file import read_cases
from sphere.evaluation.paired import paired_differences
from sphere.report.collect import load_runs
from sphere.report.pairs import compare, paired_lines

SMALL = {"batches": 2, "downstream": False}


def ends(pairs: list[dict]) -> list[tuple[str, str]]:
    """(reference, run) by their labels."""
    return [(pair["reference"]["label"], pair["run"]["label"]) for pair in pairs]


@pytest.fixture
def four(tmp_path) -> list[Path]:
    """Two methods, each with SPHERE and then without."""
    return [
        fake_run(tmp_path, method, beta, harm=0.1 if beta else 0.2, **SMALL)
        for method in ("AlphaEdit", "MEMIT")
        for beta in (0.5, 0)
    ]


def test_each_method_is_compared_with_its_plain_run(four):
    pairs = compare(load_runs(four))
    assert ends(pairs) == [("AlphaEdit", "AlphaEdit + SPHERE"), ("MEMIT", "MEMIT + SPHERE")]
    for pair, (sphere, plain) in zip(pairs, (four[:2], four[2:]), strict=True):
        assert [row["n_edits"] for row in pair["differences"]] == [10, 20]
        for row in pair["differences"]:
            name = f"summary/cases_edit_{row['n_edits']}.jsonl"
            expected = paired_differences(read_cases(plain / name), read_cases(sphere / name))
            assert row == {"n_edits": row["n_edits"], **expected}
        assert pair["differences"][-1]["score"]["difference"] > 0


def test_rules_and_directions_may_differ_and_nothing_else(tmp_path):
    plain = {"rules": None, "directions": "current", "revive_tau": 0.1}
    made = [
        fake_run(tmp_path / "revive", rules="revive", **SMALL),
        fake_run(tmp_path / "original", **{**plain, "directions": "original"}, **SMALL),
        fake_run(tmp_path / "plain", beta_hse=0, **SMALL),
        fake_run(tmp_path / "seed", beta_hse=0.3, seed=1, **SMALL),
        fake_run(tmp_path / "order", beta_hse=0.2, case_ids=list(range(20))[::-1], **SMALL),
        fake_run(tmp_path / "hparams", beta_hse=0.1, hparams={"layers": [4, 5], "L2": 2}, **SMALL),
    ]
    pairs = compare(load_runs(made))
    assert [Path(pair["reference"]["folder"]) for pair in pairs] == [made[2], made[2]]
    assert [Path(pair["run"]["folder"]) for pair in pairs] == made[:2]
    assert pairs[0]["run"]["label"].startswith("AlphaEdit, ")  # REVIVE is not SPHERE
    assert "rules revive" in pairs[0]["run"]["label"]


def test_without_a_plain_run_the_first_is_the_reference(tmp_path):
    made = [fake_run(tmp_path / str(beta), beta_hse=beta, **SMALL) for beta in (0.5, 0.3)]
    assert ends(compare(load_runs(made))) == [("AlphaEdit + SPHERE, β 0.5", "AlphaEdit + SPHERE, β 0.3")]


def test_a_run_of_ones_choice_is_the_reference_of_all(four, tmp_path):
    assert ends(compare(load_runs(four), against=four[3])) == [
        ("MEMIT", "AlphaEdit + SPHERE"),
        ("MEMIT", "AlphaEdit"),
        ("MEMIT", "MEMIT + SPHERE"),
    ]
    other = fake_run(tmp_path / "zsre", kind="zsre", **SMALL)
    with pytest.raises(SphereError, match="no scored cases in common") as error:
        compare(load_runs([other, four[3]]), against=four[3])
    assert error.value.arguments == ("against",)


def test_one_case_id_of_two_facts_is_no_pair(four):
    path = four[0] / "summary" / "cases_edit_20.jsonl"
    lines = path.read_text().splitlines()
    changed = [line.replace('"case": {', '"case": {"subject": "another", ') for line in lines]
    path.write_text("\n".join([*lines[:16], *changed[16:]]) + "\n")
    assert [row["n_cases"] for row in compare(load_runs(four[:2]))[0]["differences"]] == [10, 15]
    path.write_text("\n".join(changed) + "\n")
    assert [row["n_cases"] for row in compare(load_runs(four[:2]))[0]["differences"]] == [10]


def test_zsre_is_compared_by_accuracy_also_with_the_unedited_predictions(tmp_path):
    made = [fake_run(tmp_path, beta_hse=beta, kind="zsre", **SMALL) for beta in (0, 0.5)]
    (pair,) = compare(load_runs(made))
    row = pair["differences"][-1]
    assert {"score", "score_unedited_prediction", "efficacy_accuracy"} <= row.keys()
    head, line = paired_lines([pair], "zsre", last=True)
    shown = row["score"]
    assert line[head.index("score")] == (
        f"{shown['difference']:+.1f} [{shown['low']:.1f}, {shown['high']:.1f}]"
    )


@pytest.mark.parametrize("lacking", ["lines", "file", "summary"])
def test_what_is_not_scored_is_not_compared(four, lacking):
    summary = four[0] / "summary"
    if lacking == "lines":
        cases = summary / "cases_edit_20.jsonl"
        cases.write_text("".join(cases.read_text().splitlines(keepends=True)[:-1]))
    elif lacking == "file":
        (summary / "cases_edit_20.jsonl").unlink()
    else:
        (summary / "summary.json").unlink()
    pairs = compare(load_runs(four))
    edits = [[row["n_edits"] for row in pair["differences"]] for pair in pairs]
    assert edits == ([[10, 20]] if lacking == "summary" else [[10], [10, 20]])


def test_page_file_and_terminal_say_the_same(four, tmp_path, capsys):
    flags = ["--weight_folder", str(four[0]), "--against", str(four[3]), "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    (pair,) = json.loads((tmp_path / "out" / "report" / "paired.json").read_text())["pairs"]
    assert ends([pair]) == [("MEMIT", "AlphaEdit + SPHERE")]
    assert f"--against</span> <span>{four[3]}" in page
    for row in pair["differences"]:
        shown = row["score"]
        cell = f"{shown['difference']:+.1f} [{shown['low']:.1f}, {shown['high']:.1f}]"
        assert cell in printed
        assert cell in page


def test_one_run_has_nothing_to_be_compared_with(four):
    assert compare(load_runs(four[:1])) == []
