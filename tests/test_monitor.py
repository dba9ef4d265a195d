"""The figures of the per-batch log against direct calls, and their reference after a resume."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shlex

import pytest
import torch
from conftest import (
    GPT2_MODULES,
    LLAMA_MODULES,
    REQUESTS,
    SPHERE_KEYS,
    tiny_gpt2,
    tiny_llama,
    tiny_values,
)
from tiny_run import TinyRun

import sphere.runs.monitor
from experiments.evaluate import parser
from sphere.checkpoints import read_config, read_weights
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.hparams import hparams_from_dict
from sphere.hypersphere import (
    PLAIN_BETA,
    condition_number,
    energy_change,
    hyperspherical_energy,
    principal_share,
)
from sphere.methods import get_method
from sphere.projection import principal_directions
from sphere.runs.config import RunConfig, command_of
from sphere.runs.monitor import Monitor
from sphere.runs.remake import commands_of
from sphere.runs.run import execute

TEMPLATES = (("{}",),)
FIGURES = ("energy", "energy_change", "delta_norm", "rank", "principal_share_before", "principal_share_after")


def editor_of(method, tokenizer, *, beta_hse, model=None, modules=LLAMA_MODULES, **changes):
    values = tiny_values(modules, **changes)
    if method == "AlphaEdit":
        values |= SPHERE_KEYS
    hparams = hparams_from_dict(values, get_method(method).hparams_class)
    return Editor(
        model or tiny_llama(),
        tokenizer,
        method,
        hparams,
        beta_hse=beta_hse,
        alpha=0.5,
        context_templates=TEMPLATES,
        progress=False,
    )


@pytest.fixture
def edit(tiny_tokenizer, tmp_path):
    """Edit one batch under a monitor; gives the editor and the report."""

    def run(method, **options):
        editor = editor_of(method, tiny_tokenizer, **options)
        editor.services.stats_dir = tmp_path
        reference = {name: editor.weights.get(name).clone() for name in editor.weights.names}
        monitor = Monitor(reference)
        return editor, reference, editor.edit(REQUESTS, monitor.measure)

    return run


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT"])
@pytest.mark.parametrize("beta_hse", [0.0, 0.3])
def test_figures_equal_direct_calls(edit, method, beta_hse):
    editor, reference, report = edit(method, beta_hse=beta_hse)
    assert list(report.layers) == editor.weights.names
    for name, figures in report.layers.items():
        weight, before = editor.weights.get(name), reference[name]
        change = weight - before
        directions = principal_directions(before, beta_hse or PLAIN_BETA)
        assert figures["energy"] == hyperspherical_energy(weight)
        assert figures["energy_change"] == pytest.approx(energy_change(weight, before), abs=1e-12)
        assert figures["condition"] == condition_number(weight)
        assert figures["delta_norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert figures["rank"] == directions.rank
        written = principal_share(change, directions.basis)
        assert figures["principal_share_after"] == pytest.approx(written, abs=1e-4)
        if beta_hse:
            assert figures["principal_share_before"] > figures["principal_share_after"]
        else:
            assert figures["principal_share_before"] == figures["principal_share_after"]
    assert json.loads(json.dumps(report.layers, allow_nan=False)) == report.layers
    assert report.measure_seconds > 0


def test_transposed_weights_are_measured_by_neurons(edit):
    editor, reference, report = edit("MEMIT", beta_hse=0.3, model=tiny_gpt2(), modules=GPT2_MODULES)
    assert editor.weights.transposed == editor.weights.names
    for name, figures in report.layers.items():
        assert reference[name].shape == (32, 128)
        assert figures["energy_change"] == pytest.approx(
            energy_change(editor.weights.get(name), reference[name])
        )


def test_what_is_saved_is_measured_where_the_total_change_is_conditioned(edit):
    editor, reference, report = edit("MEMIT_prune", beta_hse=0.3, prune_base=1.2, mom2_update_weight=0.01)
    saved = editor.final_weights()
    for name, figures in report.layers.items():
        assert figures["energy"] == pytest.approx(hyperspherical_energy(saved[name]))
        directions = principal_directions(reference[name], 0.3)
        share = principal_share(saved[name] - reference[name], directions.basis)
        assert figures["principal_share_after"] == pytest.approx(share, abs=1e-4)
        assert figures["rank"] == directions.rank


def test_several_updates_of_a_weight_are_averaged(edit):
    editor, reference, report = edit("ROME", beta_hse=0.3, layers=[1], mom2_adjustment=False)
    (figures,) = report.layers.values()
    change = editor.weights.get(editor.weights.names[0]) - reference[editor.weights.names[0]]
    assert figures["delta_norm"] == pytest.approx(
        float(change.norm()), rel=1e-5
    )  # of the batch, not of a fact
    assert set(FIGURES) <= set(figures)


def test_unmeasured_batches_have_no_energies(tiny_tokenizer, tmp_path):
    editor = editor_of("MEMIT", tiny_tokenizer, beta_hse=0.3)
    editor.services.stats_dir = tmp_path
    report = editor.edit(REQUESTS)
    assert report.measure_seconds == 0
    for figures in report.layers.values():
        assert "energy" not in figures
        assert figures["delta_norm"] > 0


def test_every_nth_batch_is_due():
    weight = {"w": torch.randn(4, 5)}
    assert [b for b in range(7) if Monitor(weight, 3).due(b)] == [2, 5]
    assert [b for b in range(3) if Monitor(weight, 1).due(b)] == [0, 1, 2]
    assert not any(Monitor(weight, 0).due(b) for b in range(3))
    assert Monitor({"w": torch.zeros(4, 5)}, 0).reference_energy == {}
    with pytest.raises(SphereError, match="'w' has fewer than two non-zero rows"):
        Monitor({"w": torch.zeros(4, 5)})


# ---- in a run ----


@pytest.fixture
def run_of(tiny_tokenizer, tmp_path):
    """Run 6 facts in batches of 2 on a tiny model; keyword arguments change the configuration."""
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=6)

    def run(**changes):
        return execute(world.config(**{"alg_name": "MEMIT", "log_energy_every": 1, **changes}))

    return run


def logged(folder):
    return [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]


def interrupt(run_of, monkeypatch, batch, **changes):
    """A run that is stopped before batch `batch` (from 0)."""
    edit, calls = Editor.edit, []

    def stopped(self, *args):
        if len(calls) == batch:
            raise KeyboardInterrupt
        calls.append(1)
        return edit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_of(**changes)


def test_a_resumed_run_measures_against_the_unedited_weights(run_of, monkeypatch):
    whole = logged(run_of(output="whole").folder)
    interrupt(run_of, monkeypatch, batch=2)
    folder = run_of(continue_from_run=True).folder
    lines = logged(folder)
    assert [line["n_edits"] for line in lines] == [2, 4, 6]
    original = read_weights(folder / "edit_0.safetensors")
    for line, other in zip(lines, whole, strict=True):
        saved = read_weights(folder / f"edit_{line['n_edits']}.safetensors")
        for name, figures in line["layers"].items():
            assert figures["energy_change"] == pytest.approx(energy_change(saved[name], original[name]))
            assert figures["energy_change"] == pytest.approx(other["layers"][name]["energy_change"])


def test_the_log_is_thinned_or_left_out(run_of):
    lines = logged(run_of(log_energy_every=2).folder)
    measured = ["energy" in figures for line in lines for figures in line["layers"].values()]
    assert measured == [False, False, True, True, False, False]
    lines = logged(run_of(log_energy_every=0, overwrite=True).folder)
    assert not any("energy" in figures for line in lines for figures in line["layers"].values())


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_events_are_the_log(run_of, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt(run_of, monkeypatch, batch=1, tensorboard=True)
    folder = run_of(tensorboard=True, continue_from_run=True).folder
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name, figures in logged(folder)[-1]["layers"].items():
        scalars = events.Scalars(f"{name}/energy_change")
        assert [event.step for event in scalars] == [2, 4, 6]
        assert math.isclose(scalars[-1].value, figures["energy_change"], rel_tol=1e-5)


def test_tensorboard_missing_is_one_sentence(run_of, monkeypatch):
    monkeypatch.setattr(sphere.runs.monitor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SphereError, match="needs the package tensorboard: run `pip install"):
        run_of(tensorboard=True)


def test_the_command_makes_the_run_again():
    config = RunConfig(
        alg_name="MEMIT", dataset_size_limit=7, beta_hse=0, output_dir="a b", tensorboard=True, overwrite=True
    )
    command = command_of(dataclasses.asdict(config))
    assert command.startswith("python -m sphere edit --alg_name=MEMIT")
    assert "overwrite" not in command
    arguments = vars(parser().parse_args(shlex.split(command)[4:]))
    for field, value in dataclasses.asdict(config).items():
        if field != "overwrite":
            assert arguments[field] == value
    everything = {"dataset_size_limit": None, "case_ids": [3, 4, 5]}
    assert "--dataset_size_limit=3" in command_of(everything)


def test_the_command_of_all_of_a_dataset_says_how_many_facts_these_are(run_of):
    """No flag says "all"; a run that was continued with further facts began with those of its first part."""
    folder = run_of(alg_name="FT", dataset_size_limit=None).folder
    stored = read_config(folder)
    assert stored["command"].count("--dataset_size_limit=6") == 1
    command = "python -m sphere edit --ds_name=zsre"  # of an earlier version
    more = {"facts": "more.csv", "command": "python -m sphere edit --continue=x --facts=more.csv"}
    later = {"command": command, "parts": [0, 4], "continued": [more]}
    continued = {**stored, "facts": "more.csv", **later}
    assert commands_of(continued, folder) == [f"{command} --dataset_size_limit=4", more["command"]]
    for kept in (f"{command} '--facts=my first.csv'", f"{command} --dataset_size_limit=9", "my own.py"):
        assert commands_of({**continued, "command": kept}, folder)[0] == kept
    assert commands_of({**continued, "dataset_size_limit": 40}, folder)[0] == command
