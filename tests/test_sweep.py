"""Sweeps: jobs in folders of their own, finished ones left alone, killed ones gone on with, all in one table."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA_MODULES, tiny_hparams, tiny_llama
from filelock import FileLock
from safetensors.torch import load_file
from tiny_run import TinyRun

import sphere.values.layer_stats
from experiments import demo
from experiments import sweep as command
from sphere.commands.sweep_job import job_of, jobs_of
from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.runs.config import RunConfig
from sphere.runs.job import Job, check_folders
from sphere.runs.run import execute
from sphere.runs.sweep import run_job
from sphere.runs.sweep_table import collect
from sphere.values.layer_stats import SecondMoments

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that nothing here may take


@pytest.fixture
def world(tmp_path, tiny_tokenizer) -> TinyRun:
    return TinyRun(tmp_path, tiny_tokenizer, n_records=12)


def overrides(world: TinyRun, **values: object) -> list[str]:
    """Of `python -m experiments.sweep`."""
    places = {k: v for k, v in world.places.items() if k != "cache_dir"}
    given = {**places, "sweep_dir": world.folder / "sweep", "device": "cpu", "num_edits": 2, **values}
    return [f"{key}={value}" for key, value in given.items()]


def jobs(world: TinyRun) -> dict[str, dict]:
    """Folder -> what became of each job so far."""
    found = {}
    for path in (world.folder / "sweep").rglob("job.json"):
        found[str(path.parent.relative_to(world.folder / "sweep"))] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_in_one_table(world):
    """Four jobs, two at a time; killed while at least one is finished and one is not."""
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed"
    )
    words = overrides(world, alg_name="AlphaEdit,MEMIT_seq", seed="0,1", checkpoints="all")
    arguments = [sys.executable, "-m", "experiments.sweep", *words]
    arguments += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (world.folder / "out.txt").open("w") as out:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            until, statuses = time.monotonic() + SECONDS, []
            while "finished" not in statuses and time.monotonic() < until:
                assert process.poll() is None, (world.folder / "out.txt").read_text()
                time.sleep(0.01)
                statuses = [job["status"] for job in jobs(world).values()]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(SECONDS)
    assert "finished" in statuses, (world.folder / "out.txt").read_text()
    killed = jobs(world)
    finished = {name for name, job in killed.items() if job["status"] == "finished"}
    assert 1 <= len(finished) < 4
    assert not (world.folder / "sweep" / "sweep.md").exists()

    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    after = jobs(world)
    assert len(after) == 4
    assert all(job["status"] == "finished" for job in after.values())
    assert {name: after[name] for name in finished} == {name: killed[name] for name in finished}
    rows = json.loads((world.folder / "sweep" / "sweep.json").read_text())
    assert [(row["alg_name"], row["seed"], row["n_edits"]) for row in rows] == [
        ("AlphaEdit", 0, 12),
        ("AlphaEdit", 1, 12),
        ("MEMIT_seq", 0, 12),
        ("MEMIT_seq", 1, 12),
    ]
    table = (world.folder / "sweep" / "sweep.md").read_text()
    assert "| AlphaEdit alpha=0.5 seed=0 | 12 |" in table
    assert "Mean over seeds" in table
    assert "sphere report --weight_folder" in done.stdout
    # what was broken off ends where a run on its own ends
    name = sorted(set(after) - finished)[0]
    settings = {
        k: v
        for k, v in after[name]["settings"].items()
        if k not in ("generation_interval", "exact_match_facts", "generated_facts", "hparams")
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the jobs: Adam makes much of a rounding error where a gradient is near zero
    try:
        alone = execute(RunConfig(**settings | {"output_dir": str(world.folder / "alone")}))
    finally:
        torch.set_num_threads(threads)
    resumed = load_file(world.folder / "sweep" / name / "edit_12.safetensors")
    for key, weight in load_file(alone.folder / "edit_12.safetensors").items():
        assert torch.allclose(resumed[key], weight, rtol=1e-4, atol=1e-6)


def test_a_job_that_fails_ends_itself_only(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep"])
    world.write_hparams("MEMIT", layers=[1, 99])
    words = overrides(world, alg_name="FT,MEMIT", beta_hse="0,0.5", dataset_size_limit=4)
    with pytest.raises(SphereError, match="2 of 4 jobs are not finished"):
        command.main([*words, "report=false"])
    assert not (world.folder / "sweep" / "report").exists()
    rows = collect(world.folder / "sweep")
    assert [(row["alg_name"], row["beta_hse"], row["status"]) for row in rows] == [
        ("FT", 0.0, "finished"),
        ("FT", 0.5, "finished"),
        ("MEMIT", 0.0, "failed"),
        ("MEMIT", 0.5, "failed"),
    ]
    assert "layer 99" in rows[2]["error"]
    out = capsys.readouterr().out
    assert re.search(r"MEMIT.*: failed\. .*layer 99", out)
    with (world.folder / "sweep" / "sweep.csv").open() as file:
        flat = list(csv.DictReader(file))
    assert [line["n_edits"] for line in flat] == ["4", "4", "", ""]
    assert float(flat[0]["efficacy_success_low"]) <= float(flat[0]["efficacy_success"])
    # fixed, only what had failed is run
    world.write_hparams("MEMIT")
    seconds = rows[0]["seconds"]
    capsys.readouterr()
    assert command.main(words) == 0
    rows = collect(world.folder / "sweep")
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert rows[0]["seconds"] == seconds
    out = capsys.readouterr().out
    assert out.count("finished in") == 2  # what was there before
    assert "||change||" in out
    assert len(re.findall(r"^(FT|MEMIT) \+ SPHERE +\1 +4 +4 ", out, re.MULTILINE)) == 2  # paired differences
    assert (world.folder / "sweep" / "report" / "report.html").exists()
    assert (world.folder / "sweep" / "report" / "paired.json").exists()
    # finished jobs keep their place, and those that fail there are not passed over
    world.write_hparams("FT", lr=0.5)
    with pytest.raises(SphereError, match=r"1 of 1 jobs failed .*another sweep_dir"):
        command.main([*words, "alg_name=FT", "beta_hse=0", "report=false"])
    assert collect(world.folder / "sweep") == rows


def test_folders_tell_jobs_apart(world):
    base = world.config("sweep", alg_name="FT")
    other = {
        "seed": 1,
        "dataset_size_limit": 4,
        "hparams_fname": "other.json",
        "beta_hse": 0.25,
        "alpha": 0.1,
    }
    other |= {"num_edits": 3, "alg_name": "ROME", "dtype": "float64", "z_matmul_dtype": "bfloat16"}
    folders = {Job(base).folder} | {
        Job(world.config("sweep", **{"alg_name": "FT", k: v})).folder for k, v in other.items()
    }
    assert len(folders) == 1 + len(other)
    assert Job(base).folder.relative_to(world.folder).parts[:4] == ("sweep", "seed_0", "FT", "tiny")


def test_a_limit_is_named_where_it_is_not_the_default(tmp_path):
    """Neither in folders nor in labels: 40 of a dataset, all of one's own facts."""
    given = (
        {},
        {"facts": "f.csv"},
        {"facts": "f.csv", "dataset_size_limit": 40},
        {"dataset_size_limit": None},
    )
    for more in given:
        job = job_of({"sweep_dir": tmp_path, "devices": [], "alg_name": "FT", **more})
        job.folder.mkdir(parents=True)
        state = {"status": "failed", "error": None, "seconds": 0.0, "settings": job.settings}
        (job.folder / "job.json").write_text(json.dumps(state))
    rows = collect(tmp_path)
    assert {row["label"]: Path(row["folder"]).relative_to(tmp_path).parts[0] for row in rows} == {
        "FT ds_name=starter": "seed_0",
        "FT ds_name=facts": "seed_0",
        "FT ds_name=facts dataset_size_limit=40": "seed_0_dataset_size_limit_40",
        "FT ds_name=starter dataset_size_limit=None": "seed_0_dataset_size_limit_None",
    }


def test_a_job_of_facts_that_an_earlier_version_has_limited(world):
    """To 40: the same job where there are no more; else it fails, and nothing changes."""
    table = world.folder / "facts.csv"
    row = "{{}} is in,Ann{},Rome,Paris,Bob is in => Oslo\n"
    head = "prompt,subject,target_new,target_true,neighborhood\n"
    table.write_text(head + "".join(map(row.format, range(3))))
    job = Job(world.config("sweep", alg_name="FT", facts=str(table), dataset_size_limit=None))
    assert job.folder.relative_to(world.folder).parts[:2] == ("sweep", "seed_0")
    assert run_job(job)["status"] == "finished"
    path, log = job.folder / "job.json", (job.folder / "batches.jsonl").read_bytes()
    limited = json.loads(path.read_text())
    limited["settings"]["dataset_size_limit"] = 40
    limited["settings"]["output_dir"] = str(world.folder / "sweep" / "seed_0")
    path.write_text(json.dumps(limited))
    assert run_job(job)["status"] == "finished"
    assert (job.folder / "batches.jsonl").read_bytes() == log
    assert json.loads(path.read_text())["settings"]["dataset_size_limit"] is None
    path.write_text(json.dumps(limited))
    table.write_text(head + "".join(map(row.format, range(41))))
    before = {file: file.read_bytes() for file in job.folder.rglob("*.json*") if file != path}
    assert "begun with other settings (case_ids, requests)" in run_job(job)["error"]
    assert before == {file: file.read_bytes() for file in before}
    assert json.loads(path.read_text()) == limited


def test_different_jobs_in_one_folder_are_refused_before_the_first(world, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep"])
    said = r"jobs with guard=false and with guard=true would both be the run in .*sweep_dir"
    with pytest.raises(SphereError, match=said) as refused:
        command.main([*overrides(world), "guard=false,true"])
    assert refused.value.arguments == ("sweep_dir",)
    assert not (world.folder / "sweep").exists()


@pytest.mark.parametrize(
    "name, values",
    [
        ("on_breakdown", ("stop", "continue")),
        ("save", ("weights", "factors")),
        ("ledger", ("auto", "none")),
        ("facts", ("a/f.csv", "b/f.csv")),
        ("model_name", ("org1/m", "org2/m")),
        ("hparams_dir", ("a", "b")),
        ("scored_facts", ("0", "5")),
        ("generated_facts", ("0", "5")),
    ],
)
def test_the_settings_of_jobs_in_one_folder_are_named(name, values):
    both = [
        job_of({"sweep_dir": "x", "devices": [], name: v if v.isalpha() or "/" in v else int(v)})
        for v in values
    ]
    assert both[0].folder == both[1].folder
    with pytest.raises(SphereError, match=f"{name}={values[0]} and with {name}={values[1]} would"):
        check_folders(both)


def test_jobs_with_folders_of_their_own_are_not_refused():
    check_folders(jobs_of(["alg_name=AlphaEdit", "alpha=null,0.5"]))  # the same job, said twice
    check_folders([*jobs_of(["sweep_dir=a", "guard=false"]), *jobs_of(["sweep_dir=b", "guard=true"])])


def test_changed_settings_are_run_again(world, monkeypatch):
    job = Job(world.config("sweep", alg_name="FT", dataset_size_limit=2))
    first = run_job(job)
    assert first["status"] == "finished"
    assert run_job(job) == first
    assert run_job(Job(world.config("sweep", alg_name="FT", dataset_size_limit=2, batch_tokens=64))) == first
    again = run_job(Job(job.config, generation_interval=1))
    assert again["status"] == "finished"
    assert again["seconds"] > first["seconds"]
    world.write_hparams("FT", lr=0.5)
    other = Job(job.config, generation_interval=1)
    changed = run_job(other)
    assert changed["status"] == "failed"
    assert "begun with other settings (hparams)" in changed["error"]
    # what is finished keeps its place, also where the other job was cut off first
    path = job.folder / "job.json"
    assert json.loads(path.read_text()) == again

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sphere.runs.sweep.execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_job(other)
    assert json.loads(path.read_text())["status"] == "unfinished"
    assert run_job(other)["status"] == "failed"
    assert json.loads(path.read_text()) == again


def test_a_finished_run_is_not_taken_for_a_guarded_one(world):
    job = Job(world.config("sweep", alg_name="FT", dataset_size_limit=2))
    run_job(job)
    before = {path: path.read_bytes() for path in job.folder.rglob("*.json*")}
    for name, value, words in (("guard", True, "guard=true"), ("save", "factors", "save=factors")):
        late = run_job(Job(dataclasses.replace(job.config, **{name: value})))
        assert late["status"] == "failed"
        assert f"the job with {words} cannot change any more" in late["error"]
    assert before == {path: path.read_bytes() for path in job.folder.rglob("*.json*")}


def test_a_job_of_before_a_setting_is_finished(world):
    job = Job(world.config("before", alg_name="FT", dataset_size_limit=2))
    first = run_job(job)
    path = job.folder / "job.json"
    old = json.loads(path.read_text())
    del old["settings"]["chat_template"]
    path.write_text(json.dumps(old))
    assert run_job(job)["seconds"] == first["seconds"]


def test_jobs_take_turns_at_devices():
    config = {"sweep_dir": "x", "generation_interval": 0, "devices": ["cuda:0", "cuda:1"], "device": "auto"}
    assert [job_of(config, i).config.device for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert job_of(config | {"devices": []}, 1).config.device == "auto"


def test_two_processes_are_not_at_one_run(world):
    job = Job(world.config("sweep", alg_name="FT", dataset_size_limit=2))
    job.folder.mkdir(parents=True)
    with FileLock(job.folder / ".lock"):
        result = run_job(job)
    assert result["status"] == "busy"
    assert "is in use by another process" in result["error"]
    assert not (job.folder / "job.json").exists()


@pytest.mark.parametrize("word", ["num_edits=many", "nonsense=1"])
def test_a_bad_setting_is_named(word, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sweep"])
    with pytest.raises(SystemExit) as stopped:
        command.main([f"sweep_dir={tmp_path}", word])
    assert stopped.value.code == 1
    assert word.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["joblib", "basic", "submitit_local"])
def test_the_demo_takes_another_launcher(launcher, tmp_path, monkeypatch, capsys):
    """The number of jobs is a setting of the demo's own launcher."""
    found = []
    monkeypatch.setattr("sphere.commands.sweep.main", lambda words: found.append(words) or 0)
    given = [] if launcher == "joblib" else [f"hydra/launcher={launcher}"]
    assert demo.main([*given, f"sweep_dir={tmp_path}"]) == 0
    of_launcher = [word for word in found[0] if "launcher" in word]
    assert of_launcher == (given or ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])


def test_jobs_side_by_side_compute_second_moments_once(tmp_path, tiny_tokenizer, monkeypatch):
    """The second job waits for the first, and reads what it wrote."""
    hparams = tiny_hparams(LLAMA_MODULES)
    both = [
        SecondMoments(LayerStack(tiny_llama(), hparams), tiny_tokenizer, hparams, tmp_path, progress=False)
        for _ in range(2)
    ]
    computed, own = [], sphere.values.layer_stats.layer_stats

    def slowly(*args: Any, **options: Any) -> Any:
        computed.append(1)
        time.sleep(0.2)
        return own(*args, **options)

    monkeypatch.setattr(sphere.values.layer_stats, "layer_stats", slowly)
    threads = [threading.Thread(target=moments.get, args=(1,)) for moments in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert len(computed) == 1
    assert torch.equal(*(moments.get(2) for moments in both))
