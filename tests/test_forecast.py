"""How long a sweep will take: the jobs that Hydra will run, the plan's word on them, and that of finished ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyRun

from sphere.commands import sweep
from sphere.commands.sweep_job import jobs_of
from sphere.runs.forecast import Expected, duration, expect, progress_line, remaining, write_forecast
from sphere.runs.job import Job
from sphere.runs.operation_counter import count
from sphere.runs.plan import plan_run
from sphere.runs.rates import measure_rates
from sphere.runs.sweep import run_job


def expected(**changes: Any) -> Expected:
    return Expected(**{"folder": "x", "like": "MEMIT", "n_edits": 100, "seconds": 50.0, **changes})


def test_the_jobs_are_those_of_the_overrides() -> None:
    words = ["alg_name=FT,ROME", "beta_hse=0,0.5", "seed=range(1,3)", "shuffle=true", "sweep_dir=x"]
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "checkpoints='100,300'"]
    jobs = jobs_of(
        [*words, "devices=[cuda:0,cuda:1]", "rules=null", "exact_match_facts=3", "generated_facts=4"]
    )
    assert [(j.config.alg_name, j.config.beta_hse, j.config.seed) for j in jobs] == [
        (method, beta, seed) for method in ("FT", "ROME") for beta in (0, 0.5) for seed in (1, 2)
    ]
    assert {(j.config.checkpoints, j.config.shuffle) for j in jobs} == {("100,300", True)}
    assert {(j.exact_match_facts, j.generated_facts) for j in jobs} == {(3, 4)}
    assert [j.config.device for j in jobs[:3]] == ["cuda:0", "cuda:1", "cuda:0"]
    assert len({j.folder for j in jobs}) == 8


def test_a_finished_job_says_what_the_others_take() -> None:
    todo = [expected(), expected(like="ROME", seconds=200.0), expected(like="FT", seconds=None)]
    assert remaining(todo) == (250, 1)  # the plan alone
    half = [expected(done=50), *todo[1:]]
    assert remaining(half) == (225, 1)
    finished = expected(measured=100.0)  # twice what the plan said
    assert remaining([finished, *todo]) == (100 + 400, 1)
    assert remaining([finished, expected(n_edits=300, seconds=None)]) == (300, 0)
    assert remaining([finished, expected(like="FT", seconds=None, measured=10.0)]) == (0, 0)
    assert remaining([expected(like="FT", seconds=None, measured=30.0), *todo]) == (250 + 30, 0)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (99, "99 s"), (600, "10 min"), (5880, "98 min"), (12060, "3 h 21 min")]
)
def test_durations_in_words(seconds, text) -> None:
    assert duration(seconds) == text


def test_the_plan_is_asked_for_what_is_edited(tmp_path, tiny_tokenizer) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=8)
    base = {"dataset_size_limit": 40, "num_edits": 2}  # there are but 8 records
    jobs = [Job(world.config("sweep", alg_name=name, **base)) for name in ("MEMIT", "FT")]
    memit, ft = expect(jobs)
    assert (memit.n_edits, memit.done, memit.measured) == (8, 0, None)
    assert memit.seconds is not None
    assert ft.seconds is None  # the plan counts no training
    assert memit.memory > memit.disk > 0
    plan = plan_run(jobs[0].config)
    batch = plan.seconds(dict.fromkeys(measure_rates("cpu", plan.dtype), 1.0))
    assert batch == sum(operations for _, _, operations in plan.flops)
    world.write_hparams("MEMIT", layers="all")
    assert expect(jobs[:1])[0].seconds is None  # the job itself will say what is wrong


def test_jobs_say_how_far_the_sweep_is(tmp_path, tiny_tokenizer) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=4)
    folder = tmp_path / "sweep"
    jobs = [Job(world.config("sweep", alg_name="FT", beta_hse=beta)) for beta in (0, 0.5)]
    assert progress_line(folder) is None
    write_forecast(folder, expect(jobs))
    assert progress_line(folder) == (
        "0 of 2 jobs are finished; 2 jobs of which it is not known yet how long they take."
    )
    seconds = run_job(jobs[0])["seconds"]
    line = progress_line(folder)
    assert line == f"1 of 2 jobs are finished; about {duration(seconds)} to go."
    again = expect(jobs)
    assert [job.measured for job in again] == [seconds, None]
    run_job(jobs[1])
    assert progress_line(folder) == "2 of 2 jobs are finished; nothing is left to do."


def test_a_dry_run_lists_the_jobs_and_leaves_nothing(tmp_path, tiny_tokenizer, monkeypatch, capsys) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=4)
    places = [f"{key}={value}" for key, value in world.places.items()]
    words = [*places, f"sweep_dir={tmp_path / 'sweep'}", "num_edits=2", "device=cpu", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["sweep"])
    assert sweep.main([*words, "alg_name=MEMIT,FT", "shuffle=true", "seed=1,2"]) == 0
    out = capsys.readouterr().out
    for method in ("MEMIT", "FT"):
        for seed in (1, 2):
            assert str(Path(f"seed_{seed}", method, "tiny", "starter_weight_data_batch_2_0.5_")) in out
    assert "4 jobs; about" in out
    assert "2 jobs of which it is not known yet" in out
    assert re.search(
        r"A job holds up to 0\.\d\d GiB of memory at a time, all files together 0\.\d\d GiB\.", out
    )
    assert not (tmp_path / "sweep").exists()


def test_a_model_is_counted_once(tmp_path, tiny_tokenizer, monkeypatch) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=8)
    jobs = [
        Job(world.config("sweep", alg_name=name, beta_hse=beta, num_edits=2))
        for name in ("MEMIT", "AlphaEdit")
        for beta in (0, 0.5)
    ]
    alone = [plan_run(job.config) for job in jobs]
    known: dict[Any, Any] = {}
    assert [plan_run(job.config, known) for job in jobs] == alone
    calls: list[int] = []

    def counting(stack: Any, first: int, last: int) -> Any:
        calls.append(first)
        return count(stack, first, last)

    monkeypatch.setattr("sphere.runs.plan.count", counting)
    assert all(job.seconds for job in expect(jobs))
    assert len(calls) == 1
