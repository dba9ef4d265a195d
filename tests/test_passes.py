"""How passes are cut: what is asked for reaches every forward pass of every command, and the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from task_data import write_task_data
from tiny_run import TinyRun, flags
from torch.nn.modules.module import register_module_forward_pre_hook

from experiments import evaluate
from scripts import evaluate_each_epoch
from sphere.forward.passes import PassOptions
from sphere.runs.job import Job
from sphere.runs.plan import plan_run
from sphere.runs.run import execute
from sphere.runs.sweep import run_job

TOKENS = 96


@contextmanager
def recorded_passes() -> Iterator[list[tuple[int, int]]]:
    """Within the block: (sequences, tokens of each) of every forward pass, as the embeddings see it."""
    seen: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            seen.append(tuple(args[0].shape))

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def most(passes: Sequence[tuple[int, int]], longest: int = 0) -> int:
    """Tokens of the largest pass; one sequence alone that is up to `longest` long, which nothing can cut, aside."""
    assert passes
    return max((rows * width for rows, width in passes if rows > 1 or width > longest), default=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer) -> TinyRun:
    world = TinyRun(tmp_path_factory.mktemp("world"), tiny_tokenizer, n_records=4)
    write_task_data(world.folder / "tasks")
    return world


@pytest.fixture(scope="module")
def run(world) -> Path:
    return execute(world.config(alg_name="FT")).folder


def score(world: TinyRun, run: Path, **options: Any) -> int:
    """scripts.evaluate_each_epoch, to be scored anew whatever was scored before."""
    for path in [*run.glob("summary/*"), *run.glob("rect_eval/**/*.json*")]:
        path.unlink()
    given = {"weight_folder": run, "model_name": world.model, "device": "cpu"}
    return evaluate_each_epoch.main(flags(given | options))


def kinds(world: TinyRun) -> dict[str, dict[str, Any]]:
    edits = {"ds_name": "starter", "data_dir": world.folder / "data"}
    return {
        "edits": edits,
        "generation": edits | {"generation_test_interval": 1},
        "downstream": {"data_dir": world.folder / "tasks"},
    }


PARAGRAPH = 256  # of the fixed text, cut at the tiny model's positions


@pytest.mark.parametrize(
    ("kind", "longest"), [("edits", PARAGRAPH), ("generation", PARAGRAPH), ("downstream", 200)]
)
def test_scoring_a_run_cuts_its_passes_as_asked(kind, longest, world, run):
    with recorded_passes() as free:
        assert score(world, run, **kinds(world)[kind]) == 0
    assert most(free) > TOKENS
    with recorded_passes() as cut:
        assert score(world, run, **kinds(world)[kind], batch_tokens=TOKENS) == 0
    assert most(cut, longest) <= TOKENS
    assert len(cut) > len(free)


def test_lm_evaluation_harness_cuts_its_passes_as_asked(world, run, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-extra.txt)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    asked = kinds(world)["downstream"] | {"tasks": "nli", "num_tests": 4}
    asked |= {"lm_eval_tasks": "sphere_nli,sphere_nli_choice"}
    with recorded_passes() as cut:
        assert score(world, run, **asked, batch_tokens=2 * TOKENS) == 0
    assert most(cut, 200) <= 2 * TOKENS
    assert len(list(run.glob("rect_eval/edit_4/lm_eval/*_samples.jsonl"))) == 2


def test_the_editing_command_scores_with_its_batch_tokens(world):
    with recorded_passes() as cut:
        assert evaluate.main(world.flags("command", alg_name="FT", batch_tokens=TOKENS)) == 0
    assert most(cut, PARAGRAPH) <= TOKENS


def test_a_job_of_a_sweep_scores_with_its_batch_tokens(world):
    with recorded_passes() as cut:
        assert run_job(Job(world.config("sweep", alg_name="FT", batch_tokens=TOKENS)))["status"] == "finished"
    assert most(cut, PARAGRAPH) <= TOKENS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("asked", [{}, {"batch_tokens": 512}, {"conserve_memory": True}])
def test_the_plan_assumes_the_passes_that_scoring_makes(world, device, asked):
    config = world.config(device=device, **asked)
    items = {item.what: item for item in plan_run(config).items if item.since == "scoring"}
    logits = config.passes.scoring_tokens(device) * 300 * 4  # of the tiny model's vocabulary, in float32
    assert items["logits"].size == logits
    assert items["edited weights to be put back"].place == (
        "host" if asked.get("conserve_memory") else "device"
    )


def test_what_suits_the_device_and_what_is_asked_for():
    assert PassOptions().scoring_tokens("cpu") < PassOptions().scoring_tokens(torch.device("cuda", 1))
    for passes in (PassOptions(batch_tokens=7), PassOptions(batch_tokens=7, conserve_memory=True)):
        assert {passes.editing_tokens, passes.scoring_tokens("cuda"), passes.decoding_tokens} == {7}
    saving = PassOptions(conserve_memory=True)
    assert saving.scoring_tokens("cuda") == saving.decoding_tokens == saving.editing_tokens
    assert (saving.offload_device, PassOptions().offload_device) == ("cpu", None)
