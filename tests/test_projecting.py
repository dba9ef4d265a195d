"""Rules that act once all layers are solved, beside the same made of an unprojected run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_architectures import (
    ARCHITECTURES,
    MORE,
    REQUESTS,
    TEMPLATES,
    tiny_hparams,
    tiny_model,
    tiny_tokenizer,
)

from benchmarks.plain.projection import project_update
from sphere import Editor, SphereError

BETA, ALPHA = 0.5, 0.5


def editor_of(method: str, folder: Path, beta_hse: float, project: str) -> Editor:
    config, shipped = ARCHITECTURES["llama"]
    editor = Editor(
        tiny_model(config),
        tiny_tokenizer(),
        method,
        tiny_hparams(method, shipped),
        beta_hse=beta_hse,
        alpha=ALPHA,
        project=project,
        stats_dir=folder,
        context_templates=TEMPLATES,
        progress=False,
    )
    for layer in editor.edited.hparams.layers:
        keys = torch.randn(32, 200, generator=torch.Generator().manual_seed(layer))
        editor.services.second_moments.set(layer, keys @ keys.T / 200)
    return editor


def test_after_is_the_unprojected_run_projected(tmp_path: Path) -> None:
    plain, after = (editor_of("AlphaEdit", tmp_path, beta, "after") for beta in (0.0, BETA))
    before = {name: plain.weights.get(name).clone() for name in plain.weights.names}
    plain.edit(REQUESTS)
    after.edit(REQUESTS)
    for name, weight in before.items():
        delta = plain.weights.get(name) - weight
        expected = project_update(delta.double(), weight.double(), BETA, ALPHA)
        found = after.weights.get(name) - weight
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))


def test_without_rules_it_does_not_matter_when_they_act(tmp_path: Path) -> None:
    within, after = (editor_of("AlphaEdit", tmp_path, 0.0, project) for project in ("within", "after"))
    for editor in (within, after):
        editor.edit(REQUESTS)
        editor.edit(MORE)
    for name in within.weights.names:
        torch.testing.assert_close(after.weights.get(name), within.weights.get(name))


def test_it_matters_where_a_layer_is_solved_on_what_was_written_below(tmp_path: Path) -> None:
    within, after = (editor_of("AlphaEdit", tmp_path, BETA, project) for project in ("within", "after"))
    for editor in (within, after):
        editor.edit(REQUESTS)
    first, *_, last = within.weights.names
    torch.testing.assert_close(after.weights.get(first), within.weights.get(first))
    assert not torch.allclose(after.weights.get(last), within.weights.get(last))


@pytest.mark.parametrize("method", ["MEMIT", "MEMIT_seq"])
def test_methods_that_solve_all_layers_first_know_no_difference(method: str, tmp_path: Path) -> None:
    """Nor do the keys that they remember, which are those of the weights as written, rules applied."""
    within, after = (editor_of(method, tmp_path, BETA, project) for project in ("within", "after"))
    for editor in (within, after):
        editor.edit(REQUESTS)
        editor.edit(MORE)
    for name in within.weights.names:
        torch.testing.assert_close(after.weights.get(name), within.weights.get(name))


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SphereError, match="project is one of within, after, got 'between'"):
        editor_of("MEMIT", tmp_path, BETA, "between")
