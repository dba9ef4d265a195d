"""Configurations compared over facts and seeds: what is one, its intervals, and the defaults of the command."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
import pytest
from fake_runs import fake_run
from tiny_run import TinyRun

from experiments import compare
from sphere.commands.sweep_job import jobs_of
from sphere.errors import SphereError
from sphere.evaluation.case_file import read_cases
from sphere.evaluation.paired import differences_over_seeds, paired_differences
from sphere.evaluation.summary import bootstrap_means, summarise, summarise_seeds
from sphere.report.collect import load_runs
from sphere.report.comparison import boards, comparison_lines, comparison_text, difference_lines

SMALL = {"batches": 2, "downstream": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two methods without and with SPHERE, with two seeds each, on 20 facts in an order of the seed's own."""
    place = tmp_path_factory.mktemp("runs")
    made = []
    for seed in (2, 1):
        order = {
            "case_ids": [(i + seed) % 20 for i in range(20)],
            "requests": f"order {seed}",
            "shuffle": True,
        }
        for method, harm in (("MEMIT", 0.2), ("AlphaEdit", 0.02)):
            for beta in (0, 0.5):
                out = place / f"seed_{seed}"
                made.append(fake_run(out, method, beta, harm=harm - 0.01 * beta, seed=seed, **SMALL, **order))
    return made


def cases_of(folder: Path) -> list[dict]:
    return read_cases(folder / "summary" / "cases_edit_20.jsonl")


def test_runs_that_differ_in_their_seed_are_one_configuration(folders):
    (board,) = boards(load_runs(folders))
    assert [(c["label"], [*c["folders"]]) for c in board["configurations"]] == [
        (label, ["1", "2"]) for label in ("MEMIT", "MEMIT + SPHERE", "AlphaEdit", "AlphaEdit + SPHERE")
    ]
    assert (board["dataset"], board["kind"], board["unedited"]["n_edits"]) == ("mcf", "counterfact", 0)
    plain = board["configurations"][0]
    assert plain["metrics"] == summarise_seeds([cases_of(folders[4]), cases_of(folders[0])])
    assert plain["n_edits"] == 20
    assert plain["seconds_per_edit"] == pytest.approx((12 + 13) / 20)
    head, unedited, first, *_ = comparison_lines(board)
    assert unedited[0] == "unedited model"
    assert first[head.index("seeds")] == "2"
    assert first[head.index("between seeds")] == f"± {plain['metrics']['score']['seed_std']:.1f}"
    json.dumps(board)


def test_each_is_compared_with_the_reference_and_with_its_methods_plain_one(folders):
    (board,) = boards(load_runs(folders))
    ends = [(pair["reference"]["label"], pair["run"]["label"]) for pair in board["differences"]]
    assert ends == [
        ("MEMIT", "MEMIT + SPHERE"),
        ("MEMIT", "AlphaEdit"),
        ("MEMIT", "AlphaEdit + SPHERE"),
        ("AlphaEdit", "AlphaEdit + SPHERE"),
    ]
    (row,) = board["differences"][1]["differences"]
    expected = differences_over_seeds(
        [cases_of(folders[4]), cases_of(folders[0])], [cases_of(folders[6]), cases_of(folders[2])]
    )
    assert row == {"n_edits": 20, "seeds": [1, 2], **expected}
    assert row["score"]["low"] > 0
    head, *lines = difference_lines(board)
    assert lines[1][:5] == ["AlphaEdit", "MEMIT", "2", "20", "20"]
    shown = f"{row['score']['difference']:+.1f} [{row['score']['low']:.1f}, {row['score']['high']:.1f}]"
    assert lines[1][head.index("score")] == shown
    assert shown in comparison_text([board])

    (other,) = boards(load_runs(folders), "AlphaEdit + SPHERE")
    found = [(pair["reference"]["label"], pair["run"]["label"]) for pair in other["differences"]]
    assert ("AlphaEdit + SPHERE", "MEMIT") in found
    assert ("MEMIT", "MEMIT + SPHERE") in found
    with pytest.raises(
        SphereError, match="No configuration 'MEMT' is compared here: use one of MEMIT, "
    ) as error:
        boards(load_runs(folders), "MEMT")
    assert error.value.arguments == ("reference",)


def test_other_facts_and_other_models_are_other_boards(folders, tmp_path):
    less = {"case_ids": list(range(20, 30)), "batches": 1, "downstream": False}
    runs = load_runs([
        *folders,
        *(fake_run(tmp_path / "less", beta_hse=beta, seed=int(beta > 0), **less) for beta in (0, 0.5)),
        fake_run(tmp_path / "model", "MEMIT", model="another", **SMALL),
        fake_run(tmp_path / "model", model="another", **SMALL),
    ])  # fmt: skip
    found = boards(runs)
    assert [len(board["configurations"]) for board in found] == [
        4,
        2,
    ]  # one method with one seed: nothing new
    assert [pair["run"]["label"] for pair in found[1]["differences"]] == ["AlphaEdit + SPHERE"]


def test_whatever_decides_a_run_beside_its_seed_makes_another_configuration(tmp_path):
    runs = [fake_run(tmp_path / f"seed {seed}", "MEMIT", seed=seed, **SMALL) for seed in (0, 1)]
    others = [{"beta_hse": 0.3}, {"alpha_budget": 0.1}, {"rules": "revive"}, {"directions": "original"}]
    others += [{"project": "after"}, {"num_edits": 5}, {"hparams": {"layers": [4, 5], "L2": 2}}]
    runs += [fake_run(tmp_path / str(i), "MEMIT", **{**SMALL, **other}) for i, other in enumerate(others)]
    (board,) = boards(load_runs(runs))
    assert [len(c["folders"]) for c in board["configurations"]] == [2] + [1] * 7
    assert len({c["label"] for c in board["configurations"]}) == 8


def test_one_case_id_of_two_facts_makes_two_boards(tmp_path):
    made = [fake_run(tmp_path, method, **SMALL) for method in ("MEMIT", "AlphaEdit", "PRUNE", "RECT")]
    for folder in made[2:]:
        path = folder / "summary" / "cases_edit_20.jsonl"
        path.write_text(path.read_text().replace('"case": {', '"case": {"subject": "another", '))
    assert [[c["label"] for c in board["configurations"]] for board in boards(load_runs(made))] == [
        ["MEMIT + SPHERE", "AlphaEdit + SPHERE"],
        ["PRUNE + SPHERE", "RECT + SPHERE"],
    ]


def test_a_metric_that_one_seed_lacks_has_the_spread_of_the_others(folders):
    runs = [cases_of(folder) for folder in (folders[0], folders[4])]
    texts = [{"exact_match": exact, "text": ""} for exact in (True, False)]
    runs.append([case | {"greedy": texts[i % 2]} for i, case in enumerate(runs[0])])
    found = summarise_seeds(runs)
    assert found["exact_match"]["seed_std"] is None
    assert found["score"]["seed_std"] > 0
    json.dumps(found, allow_nan=False)


def test_without_a_seed_in_common_there_is_no_difference(tmp_path):
    seeds = [("MEMIT", 1), ("MEMIT", 2), ("AlphaEdit", 3)]
    made = [fake_run(tmp_path / str(seed), method, seed=seed, **SMALL) for method, seed in seeds]
    (board,) = boards(load_runs(made))
    assert len(board["configurations"]) == 2
    assert board["differences"] == []
    assert "Paired" not in comparison_text([board])


def test_one_seed_is_the_run_itself(folders):
    first, second = cases_of(folders[0]), cases_of(folders[2])
    alone = summarise_seeds([first])
    assert alone.pop("seeds") == 1
    for entry in alone.values():
        if isinstance(entry, dict):
            assert entry.pop("seed_std") is None
    assert alone == summarise(first)
    assert differences_over_seeds([first], [second]) == paired_differences(first, second)


def test_means_and_spread_are_those_of_the_runs(folders):
    runs = [cases_of(folders[0]), list(reversed(cases_of(folders[4])))]
    found = summarise_seeds(runs)
    own = [summarise(cases) for cases in runs]
    means = [s["paraphrase_success"]["mean"] for s in own]
    assert (found["seeds"], found["n_cases"]) == (2, 20)
    assert found["paraphrase_success"]["mean"] == pytest.approx(np.mean(means))
    assert found["paraphrase_success"]["seed_std"] == pytest.approx(np.std(means, ddof=1))
    parts = ("efficacy_success", "paraphrase_success", "neighborhood_success")
    assert found["score"]["value"] == pytest.approx(harmonic_mean([found[p]["mean"] for p in parts]))
    assert found["score"]["seed_std"] == pytest.approx(np.std([s["score"]["value"] for s in own], ddof=1))


def test_the_interval_is_that_of_facts_and_seeds_drawn():
    """Beside a plain bootstrap that draws both, one draw after the other."""
    rng = np.random.default_rng(3)
    table = rng.normal(size=(1, 4, 60)) + 2 * rng.normal(size=(1, 4, 1))  # seeds differ more than facts
    table[0, 1, :5] = np.nan
    low, high = np.percentile(bootstrap_means(table, 0)[0], [2.5, 97.5])
    draws = []
    for _ in range(4000):
        drawn = table[0][np.ix_(rng.integers(0, 4, 4), rng.integers(0, 60, 60))]
        draws.append(np.nanmean(drawn))
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.15)
    of_facts = np.percentile(bootstrap_means(table.reshape(1, -1), 0)[0], [2.5, 97.5])
    assert high - low > 3 * (of_facts[1] - of_facts[0])


def test_the_command_has_seeds_that_decide_the_order(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=4)
    places = [f"{key}={value}" for key, value in world.places.items()]
    words = [*places, f"sweep_dir={tmp_path / 'out'}", "num_edits=2", "device=cpu", "dry_run=true"]
    monkeypatch.setattr("sys.argv", ["compare"])
    assert compare.main([*words, "alg_name=FT", "rules=null,revive"]) == 0
    out = capsys.readouterr().out
    assert "6 jobs; " in out
    for seed in (0, 1, 2):
        own = [line for line in out.splitlines() if line.startswith(f"seed_{seed}/FT/")]
        assert [f"_shuffled_{seed} " in line for line in own] == [True, True]
        assert sum(f"_revive_shuffled_{seed} " in line for line in own) == 1
    assert not (tmp_path / "out").exists()
    (job,) = jobs_of([*compare.DEFAULTS, *words, "seed=7", "shuffle=false"])  # the later word counts
    assert (job.config.seed, job.config.shuffle) == (7, False)
