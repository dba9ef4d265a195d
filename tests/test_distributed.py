"""Two processes under torchrun do what one does: they share, agree, fail together, and make a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_data import NLI
from tiny_run import TinyRun, flags

from sphere.distributed import Processes, start
from sphere.downstream import TASKS, run_downstream
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.runs.run import execute

ROOT = Path(__file__).parents[1]


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node <processes> <arguments>`, on one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )


# ---- one process ----


def test_one_process_pays_nothing():
    processes = start("cpu")
    assert (processes.main, processes.size, processes.device) == (True, 1, "cpu")
    tensor = torch.ones(2)
    assert processes.from_main(tensor) is tensor
    assert processes.shares(sum, [1, 2, 3]) == [6]
    assert processes.shares(sum, []) == []
    assert processes.on_main(lambda: 5) == 5
    with pytest.raises(ValueError, match="mine"), processes.together():
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("device", "device_map", "message"),
    [("auto", "auto", "one of them"), ("cuda:1", None, "every process on one device")],
)
def test_what_processes_cannot_share_is_refused(monkeypatch, device, device_map, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SphereError, match=message):
        start(device, device_map)


@pytest.mark.parametrize("device", ["mps", "xpu", "toaster"])
def test_a_device_that_no_process_can_use_is_refused(monkeypatch, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SphereError, match=f"Device '{device}' is not available here") as error:
        start(device)
    assert len(str(error.value)) < 200


def test_shares_cover_everything_in_order(monkeypatch):
    """The cutting itself, for every number of processes."""
    monkeypatch.setattr("accelerate.utils.gather_object", list)  # each hears of itself only
    for n in range(8):
        for size in (2, 3, 5):
            found = []
            for index in range(size):
                process = Processes(index, size)
                found += [i for part in process.shares(list, range(n)) for i in part]
            assert found == list(range(n))


# ---- two processes ----

SCRIPT = """
import json, os, sys, torch
from sphere.distributed import start
from sphere.errors import SphereError

p = start("cpu")
notes = {}

def failing(name, job):
    try:
        with p.together():
            job()
    except Exception as error:
        notes[name] = [type(error).__name__, str(error)]

def raises(error, index):
    def job(*_):
        if p.index == index:
            raise error
    return job

notes["shares"] = p.shares(lambda own: [p.index, *own], [1, 2, 3])
notes["few"] = p.shares(lambda own: [p.index, *own], [1])
notes["main"] = p.on_main(lambda: p.index)
notes["tensor"] = p.from_main(torch.arange(6.0).view(2, 3).T * (p.index + 1)).tolist()
failing("in a share", lambda: p.shares(raises(SphereError("Case 3 is bad."), 1), [1, 2, 3]))
failing("on main", lambda: p.on_main(raises(SphereError("No space."), 0)))
failing("a bug", lambda: p.shares(raises(KeyError("x"), 0), [1, 2]))
def alone(index):
    raises(SphereError("Only here."), index)()
    p.from_main(torch.zeros(2))
failing("alone, not main", lambda: alone(1))
failing("alone, main", lambda: alone(0))
failing("at the end", raises(SphereError("Late."), 1))
failing("nothing", lambda: None)
with open(os.path.join(sys.argv[1], f"{p.index}.json"), "w") as file:
    json.dump(notes, file)
"""


def test_two_processes_share_agree_and_fail_together(tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT)
    done = torchrun(str(tmp_path / "job.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    notes = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    for note in notes:
        assert note["shares"] == [[0, 1, 2], [1, 3]]
        assert note["few"] == [[0, 1]]
        assert note["main"] == 0
        assert note["tensor"] == torch.arange(6.0).view(2, 3).T.tolist()
        assert "nothing" not in note
        for name, sentence in {
            "in a share": "Case 3 is bad.",
            "on main": "No space.",
            "alone, not main": "Only here.",
            "alone, main": "Only here.",
            "at the end": "Late.",
        }.items():
            assert note[name] == ["SphereError", sentence]
    assert notes[0]["a bug"][0] == "KeyError"
    assert notes[1]["a bug"] == ["SphereError", "Process 0 failed (KeyError: 'x')."]


TWICE = """
import json, sys, torch
from pathlib import Path
from typing import Any
from experiments import evaluate
from scripts import evaluate_each_epoch
from sphere.distributed import start

run, score, downstream, cases = (json.loads(text) for text in sys.argv[1:])
assert evaluate.main(run) == 0
if start("cpu").main:  # some cases are scored again, by both
    Path(cases).unlink()
assert evaluate_each_epoch.main(score) == 0
assert evaluate_each_epoch.main(downstream) == 0
"""


def outputs(path: Path) -> list[dict[str, Any]]:
    """Lines of downstream results without their keys, which tell weights apart that differ by rounding."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "key"} for line in lines]


def test_a_run_of_two_processes_equals_one(tmp_path, tiny_tokenizer):
    """Edited, scored, scored again; shares of unequal size; second moments and templates made on the way."""
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=7)
    settings = {"alg_name": "AlphaEdit", "num_edits": 3, "checkpoints": "all", "log_energy_every": 1}
    run = execute(world.config("one", **settings))
    run.editor.revert()
    alone = evaluate_run(run.model, run.tokenizer, run.folder, run.records, progress=False)
    (tmp_path / "data" / "task-data").mkdir()
    (tmp_path / "data" / "task-data" / TASKS["nli"].file).write_text(NLI, "utf-8")
    run_downstream(run.model, run.tokenizer, run.folder, world.places["data_dir"], tasks=["nli"])
    (moments,) = (tmp_path / "stats" / "tiny").glob("self_8_*")
    moments.rename(tmp_path / "moments")
    folder = tmp_path / "two" / run.folder.relative_to(tmp_path / "one")
    common = {"weight_folder": folder, "data_dir": world.places["data_dir"], "device": "cpu"}
    common["model_name"] = world.places["model_name"]
    (tmp_path / "job.py").write_text(TWICE)
    cases = str(folder / "summary" / "cases_edit_6.jsonl")
    score, downstream = flags({**common, "ds_name": "starter"}), flags({**common, "tasks": "nli"})
    todo = [world.flags("two", **settings), score, downstream, cases]
    done = torchrun(str(tmp_path / "job.py"), *map(json.dumps, todo))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Scores:") == 2

    for name in ("edit_0", "edit_3", "edit_6", "edit_7"):
        ours, theirs = (load_file(f / f"{name}.safetensors") for f in (folder, run.folder))
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            assert (ours[key] - weight).norm() <= 1e-5 * weight.norm()
    for path in (tmp_path / "moments").glob("*.safetensors"):
        assert torch.equal(*(load_file(p)["second_moment"] for p in (path, moments / path.name)))
    assert len((folder / "batches.jsonl").read_text().splitlines()) == 3
    shared = json.loads((folder / "summary" / "summary.json").read_text())
    for ours, theirs in zip(shared["checkpoints"], alone["checkpoints"], strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["metrics"].keys() == theirs["metrics"].keys()
        for name, entry in theirs["metrics"].items():
            if isinstance(entry, dict) and "mean" in entry:
                assert ours["metrics"][name]["mean"] == pytest.approx(entry["mean"], rel=1e-3, abs=1e-3)
    for path in (run.folder / "summary").glob("cases_edit_*.jsonl"):
        lines = (folder / "summary" / path.name).read_text().splitlines()
        assert len(lines) == len(path.read_text().splitlines())
    for path in (run.folder / "rect_eval").glob("edit_*/nli.jsonl"):
        ours, theirs = (outputs(f) for f in (folder / path.relative_to(run.folder), path))
        assert ours == theirs
    assert (folder / "rect_eval" / "summary.json").exists()
