"""Each update rule against its equation, on small matrices."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_MODULES, tiny_hparams, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import TinyRun, contents

from sphere import Editor, HParams
from sphere.errors import SphereError
from sphere.linalg import thin_svd
from sphere.projection import principal_directions, project_update
from sphere.rules import CondenseSpectrum, LargestRelative, Random, Revive, RuleSet, Sphere, rule_chain
from sphere.runs.config import RunConfig
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute


def matrix(seed: int, out: int = 6, in_features: int = 10) -> torch.Tensor:
    """Random and reproducible, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, in_features, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000), out=st.integers(2, 9), in_features=st.integers(2, 9), tau=st.floats(0, 0.99)
)
def test_revive_filters_both_sides_of_the_unedited_weight(seed, out, in_features, tau) -> None:
    original, delta = matrix(seed, out, in_features), matrix(seed + 1, out, in_features)
    u, s, vh = torch.linalg.svd(original, full_matrices=False)
    k = next(n for n in range(1, len(s) + 1) if float(s[:n].sum()) > tau * float(s.sum()) or n == len(s))
    left = torch.eye(out, dtype=torch.float64) - u[:, :k] @ u[:, :k].T
    right = torch.eye(in_features, dtype=torch.float64) - vh[:k].T @ vh[:k]
    found, metrics = Revive(tau).for_weight("w", original).apply(delta, matrix(seed + 2, out, in_features))
    assert metrics["revive_rank"] == k
    torch.testing.assert_close(found, left @ delta @ right, rtol=0, atol=1e-6)


def test_revive_needs_the_unedited_weight() -> None:
    with pytest.raises(SphereError, match="for_weight"):
        Revive(0.5).apply(matrix(0), matrix(1))
    with pytest.raises(SphereError, match="tau"):
        Revive(1.0)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_thin_svd(shape) -> None:
    weight = matrix(3, *shape)
    u, s, v = thin_svd(weight)
    torch.testing.assert_close((u * s) @ v.T, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight), rtol=1e-9, atol=1e-12)
    assert [u.shape, v.shape] == [(shape[0], min(shape)), (shape[1], min(shape))]


def test_sphere_with_the_directions_of_the_unedited_weight() -> None:
    original, now, delta = matrix(0), matrix(1), matrix(2)
    as_published = Sphere(0.5, 0.8).for_weight("w", original).apply(delta, now)[0]
    torch.testing.assert_close(as_published, project_update(delta, now, 0.5, 0.8))
    fixed = Sphere(0.5, 0.8, "original").for_weight("w", original).apply(delta, now)[0]
    torch.testing.assert_close(fixed, project_update(delta, original, 0.5, 0.8))
    with pytest.raises(SphereError, match="directions"):
        Sphere(0.5, 0.8, "first")


def test_random_takes_away_as_much_as_sphere_elsewhere() -> None:
    weight, delta = matrix(0, 12, 40), matrix(1, 12, 40)
    basis = principal_directions(weight, 0.5).basis
    rule = Random(0.5, 0.3).for_weight("w", weight)
    found, metrics = rule.apply(delta, weight)
    removed = 0.3 * (delta @ basis).norm()
    assert metrics["removed"] == pytest.approx(1)
    assert float((delta - found).norm()) == pytest.approx(float(removed))
    assert torch.linalg.matrix_rank(delta - found) == metrics["rank"] == basis.shape[1]
    assert torch.equal(found, rule.apply(delta, weight)[0])  # drawn once
    other = Random(0.5, 0.3).for_weight("v", weight).apply(delta, weight)[0]
    assert not torch.allclose(found, other)


def test_random_takes_no_more_than_there_is() -> None:
    weight = matrix(0, 12, 40)
    inside = matrix(1, 12, 12)
    basis = principal_directions(weight, 0.5).basis
    delta = inside[:, : basis.shape[1]] @ basis.T  # all of it principal
    found, metrics = Random(0.5, 1.0).for_weight("w", weight).apply(delta, weight)
    assert metrics["removed"] < 1
    assert float(found.norm()) < float(delta.norm())


# ---- chains, in the library and on the command line ----


def chain(*names: str, beta_hse: float = 0.5, **values: object) -> RuleSet:
    hparams = SimpleNamespace(**values)
    return rule_chain(names, hparams, beta_hse=beta_hse, alpha=0.8, revive_tau=0.2, seed=3)


def test_a_chain_by_names() -> None:
    assert chain("rect", "sphere").each == (LargestRelative(0.4), Sphere(0.5, 0.8))
    assert chain("rect", "sphere", rect_share=0.1).each[0] == LargestRelative(0.1)
    assert chain("random", "revive").each == (Random(0.5, 0.8, 3), Revive(0.2))
    assert chain("sphere", "random", "revive", beta_hse=0.0).each == (Revive(0.2),)
    conditioned = chain("prune", "sphere", prune_base=2.0, prune_continue="conditioned")
    assert conditioned == RuleSet((), (CondenseSpectrum(2.0), Sphere(0.5, 0.8)), True)
    assert chain() == RuleSet()
    turned = conditioned.with_directions("original")
    assert turned.total == (CondenseSpectrum(2.0), Sphere(0.5, 0.8, "original"))
    for names, says in ((("sphere", "sphere"), "twice"), (("spere",), "'spere'.*rect, prune, sphere")):
        with pytest.raises(SphereError, match=says):
            chain(*names)


def test_rules_of_an_editor(tiny_tokenizer, requests_, tmp_path) -> None:
    """By name, in hyperparameters, with directions of the unedited weight: what each does to MEMIT's update."""
    model = tiny_llama()
    unedited = {layer: model.model.layers[layer].mlp.down_proj.weight.clone() for layer in (1, 2)}

    def edited(hparams: HParams | None = None, **options: object) -> dict[int, torch.Tensor]:
        """The change of each edited weight (out x in) after a batch."""
        editor = Editor(
            model,
            tiny_tokenizer,
            "MEMIT",
            hparams or tiny_hparams(LLAMA_MODULES, HParams),
            stats_dir=tmp_path,
            context_templates=(("{}",),),
            progress=False,
            **options,
        )
        for layer in unedited:
            editor.services.second_moments.set(layer, torch.eye(48) * 0.1)
        editor.edit(requests_)
        found = {i: model.model.layers[i].mlp.down_proj.weight - weight for i, weight in unedited.items()}
        editor.revert()
        return found

    plain, sphere, revive = edited(beta_hse=0.0), edited(), edited(rules=["revive"], revive_tau=0.3)
    named = edited(tiny_hparams(LLAMA_MODULES, HParams, rules=["revive"]), revive_tau=0.3)
    none, original = edited(rules=[]), edited(directions="original")
    for layer, delta in plain.items():
        weight = unedited[layer]
        close = {"rtol": 1e-3, "atol": 1e-4 * float(delta.norm())}
        torch.testing.assert_close(none[layer], delta, **close)
        torch.testing.assert_close(named[layer], revive[layer], **close)
        torch.testing.assert_close(
            original[layer], sphere[layer], **close
        )  # in the first batch they are the same
        torch.testing.assert_close(sphere[layer], project_update(delta, weight, 0.5, 0.8), **close)
        expected = Revive(0.3).for_weight("w", weight).apply(delta, weight)[0]
        torch.testing.assert_close(revive[layer], expected, **close)


def test_rules_have_folders_of_their_own() -> None:
    def name(**settings: object) -> str:
        return folder_of(RunConfig(**settings)).name

    published = "starter_weight_data_batch_20_0.5_0.5"
    assert name() == published
    assert name(rules="rect, sphere") == f"{published}_rect+sphere"
    assert name(rules="") == f"{published}_no_rules"
    assert name(directions="original") == f"{published}_original_directions"
    assert name(rules="revive", revive_tau=0.3) == f"{published}_revive_tau_0.3"


def test_a_run_with_rules_continues_as_itself(tmp_path, tiny_tokenizer) -> None:
    tiny = TinyRun(tmp_path, tiny_tokenizer, 4)
    settings = {"rules": "revive,sphere", "directions": "original", "alg_name": "MEMIT"}
    run = execute(tiny.config(**settings))
    found = contents(run.folder)
    again = execute(tiny.config(**settings, continue_from_run=True))
    assert not again.reports
    assert contents(run.folder) == found
    config = json.loads((run.folder / "run.json").read_text())
    assert (config["rules"], config["directions"]) == ("revive,sphere", "original")
    assert "--rules=revive,sphere --directions=original" in config["command"]
