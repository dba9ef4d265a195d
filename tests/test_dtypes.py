"""Dtypes that promise speed: measured before a run, decided once, kept when the run is continued."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import TinyRun, contents
from transformers import PreTrainedTokenizerBase

from sphere.checkpoints import read_config
from sphere.forward import matmul_dtype
from sphere.runs.dtypes import USED
from sphere.runs.run import execute

ASKED = {"alg_name": "MEMIT_seq", "z_matmul_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("dtypes"), tiny_tokenizer, n_records=2)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine on which half precision takes so many times as long."""

    def pretend(times: float) -> None:
        monkeypatch.setattr(matmul_dtype, "slowdown", lambda *_: times)

    return pretend


def test_a_product_is_measured() -> None:
    device = torch.device("cpu")
    assert matmul_dtype.slowdown(torch.float32, device) == 1.0
    assert matmul_dtype.slowdown(torch.bfloat16, device) > 0.0


def test_a_slow_dtype_is_not_used_and_a_fast_one_is(world: TinyRun, tmp_path: Path, machine, caplog) -> None:
    tiny = world.copy(tmp_path)
    caplog.set_level(logging.INFO, "sphere")
    machine(0.5)
    fast = execute(tiny.config("fast", **ASKED)).folder
    assert read_config(fast)[USED] == "bfloat16"
    assert "times slower" not in caplog.text
    machine(50.0)
    slow = execute(tiny.config("slow", **ASKED)).folder
    assert (read_config(slow)["z_matmul_dtype"], read_config(slow)[USED]) == ("bfloat16", "model")
    assert caplog.text.count("bfloat16 multiplies 50.0 times slower than float32 on this cpu") == 1
    plain = execute(tiny.config("plain", alg_name="MEMIT_seq")).folder
    assert contents(slow) == contents(plain)
    assert contents(fast) != contents(plain)


@pytest.mark.parametrize(("first", "then"), [(0.5, 50.0), (50.0, 0.5)])
def test_a_continued_run_goes_on_as_it_began(
    world: TinyRun, tmp_path: Path, machine, caplog, first: float, then: float
) -> None:
    tiny = world.copy(tmp_path)
    machine(first)
    config = tiny.config("whole", num_edits=1, **ASKED)
    whole = execute(config).folder
    before = contents(whole)
    for name in ("edit_1.safetensors", "edit_2.safetensors", "resume.safetensors"):
        (whole / name).unlink()
    machine(then)
    execute(replace(config, continue_from_run=True))
    assert contents(whole) == before
    assert ("goes on with it, more slowly" in caplog.text) == (then > 1)


def test_a_run_of_before_the_measurement_used_what_was_asked_for(
    world: TinyRun, tmp_path: Path, machine
) -> None:
    import json

    tiny = world.copy(tmp_path)
    machine(0.5)
    config = tiny.config("old", **ASKED)
    folder = execute(config).folder
    before = contents(folder)
    old = {key: value for key, value in read_config(folder).items() if key != USED}
    (folder / "run.json").write_text(json.dumps(old))
    for name in ("edit_2.safetensors", "resume.safetensors"):
        (folder / name).unlink()
    machine(50.0)
    execute(replace(config, continue_from_run=True))
    assert contents(folder) == before


def test_a_slow_dtype_of_the_model_is_said_and_kept(world: TinyRun, tmp_path: Path, machine, caplog) -> None:
    tiny = world.copy(tmp_path)
    machine(50.0)
    run = execute(tiny.config("half", alg_name="FT", dtype="bfloat16"))
    assert run.model.dtype == torch.bfloat16
    assert caplog.text.count("bfloat16, the model's dtype, multiplies 50.0 times slower than float32") == 1
