"""LyapLock: its updates and its queue beside a plain least-squares problem, and after a resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import (
    ARCHITECTURES,
    MORE,
    REQUESTS,
    resume_points,
    tiny_editor,
    tiny_hparams,
    tiny_model,
)
from test_sequential_solve import relative

from benchmarks.plain import solves as plain
from sphere import Editor, SphereError
from sphere.checkpoints import read_resume
from sphere.methods.lyaplock import EarlierEdits

LAYER = 1
BATCHES = (REQUESTS[:1], REQUESTS[1:], MORE, REQUESTS[:1])
NUMBERS = {"layers": (LAYER,), "mom2_update_weight": 2.0, "preservation_bound": 0.5}


def editor_of(folder: Path, **changes: Any) -> Editor:
    config, shipped = ARCHITECTURES["llama"]
    hparams = dataclasses.replace(tiny_hparams("LyapLock", shipped), **NUMBERS | changes)
    return tiny_editor(tiny_model(config), "LyapLock", hparams, folder)


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_as_the_least_squares_problem(bound: float, tmp_path: Path) -> None:
    """Each batch's update, given what was asked for; the queue that of the paper's constants; rules seen by both."""
    editor = editor_of(tmp_path, preservation_bound=bound)
    moment, name = editor.services.second_moment(LAYER).double(), editor.weights.names[0]
    original = editor.weights.get(name).double().clone()
    editor.method.prepare()
    solve, solved = editor.method._solve, []

    def noted(layer: int, keys: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        solved.append((keys.double(), residual.double(), solve(layer, keys, residual)))
        return solved[-1][2]

    editor.method._solve = noted  # type: ignore[method-assign]
    earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
    losses: list[float] = []
    for batch in BATCHES:
        now = editor.weights.get(name).double().clone()
        report = editor.edit(batch)
        queue = plain.lyaplock_queue(losses, bound) if losses else 1.0
        assert report.layers[name]["queue"] == pytest.approx(queue, rel=1e-5)
        keys, residual, delta = solved[-1]
        weight = queue * editor.edited.hparams.mom2_update_weight
        expected = plain.lyaplock((original, now), moment, keys, residual, earlier, weight)
        assert relative(delta, expected) < 1e-4
        after = editor.weights.get(name).double()
        earlier.append((keys, after @ keys))
        losses.append(float(torch.trace((after - original) @ moment @ (after - original).T)))
    assert queue > 1 or bound > 1


def test_a_large_queue_brings_the_weight_back() -> None:
    """What weighs more than all edits is that the weight makes of preserved keys what it made of them at first."""
    generator = torch.Generator().manual_seed(0)
    original, change = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    keys, residual = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (10, 6))
    found = plain.lyaplock((original, original + change), torch.eye(10).double(), keys, residual, [], 1e9)
    torch.testing.assert_close(found, -change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [2, 60])
def test_earlier_edits_are_the_same_after_a_resume(columns: int) -> None:
    """Bit for bit, also where sums have taken the keys in; and what is saved under a name stays as it was."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    earlier, saved = EarlierEdits(), dict[str, torch.Tensor]()
    for batch in range(4):
        keys = torch.randn(10, columns if batch == 1 else 2, generator=generator)
        earlier.append(keys, weight + batch, 1.0 + batch, 0.5)
        for name, tensor in earlier.state(LAYER).items():
            assert torch.equal(saved.setdefault(name, tensor.clone()), tensor)
    again = EarlierEdits.of(LAYER, earlier.state(LAYER), torch.device("cpu"))
    assert torch.equal(again.h, earlier.h)
    assert torch.equal(again.g, earlier.g)
    assert (again.queue, again.first_loss) == (earlier.queue, earlier.first_loss)
    assert again.state(LAYER).keys() == earlier.state(LAYER).keys()
    assert any(name.startswith("h.") for name in again.state(LAYER)) == (columns == 60)


def test_it_goes_on_from_a_resume_point_and_reverts(tmp_path: Path) -> None:
    editor = editor_of(tmp_path)
    unedited = editor.final_weights()
    saved = resume_points(editor, BATCHES, tmp_path)
    expected = editor.final_weights()
    other = editor_of(tmp_path)
    other.load_state(*read_resume(saved[1]))
    for batch in BATCHES[2:]:
        other.edit(batch)
    assert all(torch.equal(other.final_weights()[name], weight) for name, weight in expected.items())
    editor.revert()
    assert all(torch.equal(editor.final_weights()[name], weight) for name, weight in unedited.items())
    for batch in BATCHES:  # the queue begins anew
        editor.edit(batch)
    assert all(torch.equal(editor.final_weights()[name], weight) for name, weight in expected.items())


def test_a_batch_that_was_refused_leaves_no_trace(tmp_path: Path) -> None:
    editor, other = editor_of(tmp_path), editor_of(tmp_path)
    for one in (editor, other):
        one.edit(BATCHES[0])

    def refuse(*_: object) -> None:
        raise SphereError("no")

    with pytest.raises(SphereError, match="no"):
        editor.edit(BATCHES[1], check=refuse)
    for one in (editor, other):
        one.edit(BATCHES[2])
    assert all(torch.equal(other.final_weights()[n], w) for n, w in editor.final_weights().items())


def test_a_bound_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SphereError, match="preservation_bound must be positive"):
        editor_of(tmp_path, preservation_bound=0.0)
