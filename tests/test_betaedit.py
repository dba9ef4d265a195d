"""BetaEdit: its updates beside the dense solve, over remakings of its null space, and after a resume."""

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

from benchmarks.plain import solves as plain
from sphere import Editor, SphereError
from sphere.checkpoints import read_resume

BATCHES = (REQUESTS[:1], REQUESTS[1:], MORE, REQUESTS[:1])
NUMBERS = {"layers": (1,), "L1": 0.1, "L2": 0.05, "nullspace_threshold": 0.1}


def editor_of(folder: Path, **changes: Any) -> Editor:
    config, shipped = ARCHITECTURES["llama"]
    hparams = dataclasses.replace(tiny_hparams("BetaEdit", shipped), **NUMBERS | changes)
    return tiny_editor(tiny_model(config), "BetaEdit", hparams, folder)


@pytest.mark.parametrize("tau", [1, 3, 1000])
def test_as_the_dense_solve(tau: int, tmp_path: Path) -> None:
    editor = editor_of(tmp_path, tau=tau)
    h, moment = editor.edited.hparams, editor.services.second_moment(1).double()
    size = len(moment)
    cache, since, n = torch.zeros(size, size).double(), 0, 0
    p = plain.projector(h.L1 * moment / (1 + h.L1), h.nullspace_threshold)
    for batch in BATCHES:
        if since >= tau:
            p = plain.projector((cache / n + h.L1 * moment) / (1 + h.L1), h.nullspace_threshold)
            since = 0
        keys = editor.services.activations(batch).compute_ks(1).double()
        editor.method.prepare()
        editor.method.state()  # as between batches
        x = editor.method.solve(1, keys)
        expected = plain.betaedit(p, moment, keys, cache, h.L1, h.L2)
        assert float((x - expected).norm() / expected.norm()) < 1e-5
        editor.edit(batch)
        cache += keys @ keys.T
        since, n = since + len(batch), n + len(batch)
    assert int(torch.linalg.matrix_rank(p)) not in (0, size)


@pytest.mark.parametrize("tau", [2, 3])
def test_it_goes_on_from_a_resume_point(tau: int, tmp_path: Path) -> None:
    """From a state before and after a remaking, to the same weights bit for bit."""
    editor = editor_of(tmp_path, tau=tau)
    saved = resume_points(editor, BATCHES, tmp_path)
    expected = editor.final_weights()
    for number, folder in enumerate(saved[:-1], 1):
        resumed = editor_of(tmp_path, tau=tau)
        resumed.load_state(*read_resume(folder))
        for batch in BATCHES[number:]:
            resumed.edit(batch)
        for name, weight in resumed.final_weights().items():
            assert torch.equal(weight, expected[name])


def test_a_batch_that_fails_leaves_the_state(tmp_path: Path) -> None:
    editor = editor_of(tmp_path, tau=2)
    editor.edit(REQUESTS)
    state = editor.method.state()

    def measure(*_args: object) -> dict[str, float]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        editor.edit(MORE, measure)
    after = editor.method.state()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("key", ["L1", "tau", "L2"])
def test_numbers_are_positive(key: str) -> None:
    with pytest.raises(SphereError, match=f"{key} must be positive"):
        dataclasses.replace(tiny_hparams("BetaEdit", "gpt2-xl"), **{key: 0})
