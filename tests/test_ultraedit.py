"""UltraEdit: its update beside one made row by row, its moments beside those of all rows; facts without a subject."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_architectures import ARCHITECTURES, MORE, REQUESTS, tiny_editor, tiny_hparams, tiny_model
from torch import Tensor

from benchmarks.plain import ultraedit as plain
from sphere import Editor, EditRequest, SphereError
from sphere.methods.ultraedit import RunningMoments, UltraEdit, UltraEditHParams, ridge_rows
from sphere.runs.config import RunConfig
from sphere.runs.facts_file import own_facts


def editor_of(architecture: str, folder: Path, beta_hse: float = 0.0, **changes: float) -> Editor:
    config, shipped = ARCHITECTURES[architecture]
    hparams = dataclasses.replace(tiny_hparams("UltraEdit", shipped), **changes)
    return tiny_editor(tiny_model(config), "UltraEdit", hparams, folder, beta_hse)


def rows_of(editor: Editor, requests: list[EditRequest]) -> dict[int, tuple[Tensor, Tensor]]:
    edited = editor.edited
    return {
        layer: plain.rows(edited.model, edited.tokenizer, edited.module(layer), requests)
        for layer in edited.hparams.layers
    }


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_as_row_by_row(architecture: str, batch_size: int, tmp_path: Path) -> None:
    """Two batches, the second standardised by the moments of both."""
    editor = editor_of(architecture, tmp_path, batch_size=batch_size)
    h: UltraEditHParams = editor.edited.hparams
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in h.layers}
    for batch in (REQUESTS, MORE):
        before = {layer: editor.edited.weight(layer).double().clone() for layer in h.layers}
        found = rows_of(editor, batch)
        editor.edit(batch)
        for layer, (keys, gradients) in found.items():
            seen[layer].append((keys, gradients))
            expected = plain.update(keys, gradients, seen[layer], h.lr, h.ridge)
            change = editor.edited.weight(layer).double() - before[layer]
            torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_moments_are_those_of_all_rows() -> None:
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    moments = RunningMoments(0, torch.zeros(6).double(), torch.zeros(6).double())
    for part in x.split([1, 20, 4, 25]):
        moments = moments.with_rows(part)
    torch.testing.assert_close(moments.standardise(x), (x - x.mean(0)) / x.std(0))


@pytest.mark.parametrize("n", [3, 8, 20])
def test_either_gram_matrix_gives_the_same(n: int) -> None:
    h = torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    expected = h @ torch.linalg.inv(h.T @ h + 2.0 * torch.eye(8).double())
    torch.testing.assert_close(ridge_rows(h, 2.0), expected)


def test_where_in_the_prompt_the_subject_is_does_not_matter(tmp_path: Path) -> None:
    """The whole prompt as the subject: the same edit."""
    changes = []
    whole = [dataclasses.replace(r, prompt="{}", subject=r.text) for r in REQUESTS]
    for requests in (REQUESTS, whole):
        editor = editor_of("llama", tmp_path)
        editor.edit(requests)
        changes.append(editor.final_weights())
    for name, weight in changes[0].items():
        assert torch.equal(weight, changes[1][name])


def test_a_batch_that_fails_leaves_the_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_of("llama", tmp_path)
    editor.edit(REQUESTS)
    state = editor.method.state()

    def measure(*_args: object) -> dict[str, float]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        editor.edit(MORE, measure)
    assert editor.method.state().keys() == state.keys()
    editor.edit(MORE)
    assert editor.method.state().keys().isdisjoint(state)


def test_one_token_has_no_deviation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    editor = editor_of("llama", tmp_path)
    report = editor.edit(REQUESTS[:1])
    assert "one answer token only" in caplog.text
    assert all(metrics["delta_norm"] == 0 for metrics in report.layers.values())
    assert isinstance(editor.method, UltraEdit)


@pytest.mark.parametrize("key", ["lr", "ridge", "batch_size"])
def test_numbers_are_positive(key: str) -> None:
    with pytest.raises(SphereError, match=f"{key} must be positive"):
        dataclasses.replace(tiny_hparams("UltraEdit", "gpt2-xl"), **{key: 0})


def test_a_table_without_subjects_is_read_for_methods_that_need_none(tmp_path: Path) -> None:
    table = tmp_path / "facts.csv"
    table.write_text("prompt,target_new\nwhat is it that one plays here,chess\n")
    facts = own_facts(RunConfig(alg_name="UltraEdit", facts=str(table)))
    assert facts is not None
    (request,) = [record.request for record in facts.records]
    assert (request.prompt, request.text) == ("{}", "what is it that one plays here")
    with pytest.raises(SphereError, match="no subject is named"):
        own_facts(RunConfig(alg_name="MEMIT", facts=str(table)))
