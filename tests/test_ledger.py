"""The ledger of a run, and undoing from it: against sums over plain checkpoints, bit for bit where that is promised."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import killed
import pytest
import torch
from conftest import LLAMA_MODULES, REQUESTS, tiny_hparams, tiny_llama
from tiny_run import TinyRun, command, contents
from transformers import PreTrainedTokenizerBase

from sphere import Editor
from sphere.checkpoints import list_checkpoints, read_weights, undone_in
from sphere.commands.main import main
from sphere.data.records import load_records
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.undo import REDO, UNDO, Choice, change
from sphere.export import export_run
from sphere.factors import BatchUpdates, Factors
from sphere.models import load_model
from sphere.rules import CondenseSpectrum, Revive, Sphere
from sphere.runs.folder import foreign_files
from sphere.runs.ledger import read_entries, read_history, read_updates, undone_cases
from sphere.runs.run import execute

N = 6  # edits of a run, in batches of 2
SUMS = ("AlphaEdit", "MEMIT", "MEMIT_seq", "ROME")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """Files of tiny runs."""
    return TinyRun(tmp_path_factory.mktemp("ledger"), tiny_tokenizer, 8)


@pytest.fixture(scope="module")
def finished(tiny: TinyRun) -> Path:
    """The output folder of a run that tests copy."""
    return execute(tiny.config("finished", dataset_size_limit=N)).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run of its own, finished."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def total(folder: Path, n: int) -> dict[str, torch.Tensor]:
    """W_n - W_0."""
    original, now = (read_weights(folder / f"edit_{i}.safetensors") for i in (0, n))
    return {name: now[name].double() - original[name].double() for name in now}


def step(folder: Path, n: int) -> dict[str, torch.Tensor]:
    """What the batch that ends after n edits added, by the checkpoints around it."""
    after, before = total(folder, n), total(folder, n - 2)
    return {name: after[name] - before[name] for name in after}


def assert_near(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        error = (found[name].double() - expected[name].double()).norm()
        assert error <= tolerance * expected[name].double().norm(), name


@pytest.mark.parametrize("method", SUMS)
@pytest.mark.parametrize("beta_hse", [0.0, 0.5])
def test_factors_are_the_updates(method: str, beta_hse: float, tiny: TinyRun) -> None:
    folder = execute(tiny.config("sums", alg_name=method, dataset_size_limit=4, beta_hse=beta_hse)).folder
    for entry in read_entries(folder):
        factors, whole = read_updates(folder, entry)
        assert entry.by_fact
        assert not whole
        assert all(one.left.shape[1] == one.right.shape[1] == 2 for one in factors.values())
        assert_near({name: one.delta() for name, one in factors.items()}, step(folder, entry.n_edits))
    assert not foreign_files(folder)


def test_linear_rules_turn_factors_as_they_turn_updates() -> None:
    torch.manual_seed(0)
    weight, factors = torch.randn(12, 20), Factors(torch.randn(12, 3), torch.randn(20, 3))
    delta = factors.delta().float()
    auto = Sphere(0.5, "auto", budget=0.3).for_weight("w", weight).at(delta, weight)
    for rule in Sphere(0.5, 0.7).at(delta, weight), auto, Revive(0.3).for_weight("w", weight):
        expected, _ = rule.apply(delta, weight)
        torch.testing.assert_close(rule.factored(factors).delta().float(), expected)


def test_factors_that_are_not_the_update_are_not_taken_for_it() -> None:
    torch.manual_seed(0)
    factors = Factors(torch.randn(12, 3), torch.randn(20, 3))
    updates = BatchUpdates(3, keep_whole=True)
    updates.add("w", 0.5 * factors.delta().float(), factors)
    assert not updates.factors()
    torch.testing.assert_close(updates.whole()["w"], 0.5 * factors.delta().float())


def test_a_fact_has_its_own_columns(tiny_tokenizer, tmp_path) -> None:
    """What a fact adds is its own residual onto its own column of the solve."""
    model = tiny_llama()
    editor = Editor(
        model,
        tiny_tokenizer,
        "AlphaEdit",
        tiny_hparams(LLAMA_MODULES),
        beta_hse=0.0,
        stats_dir=tmp_path,
        progress=False,
    )
    editor.method.prepare()
    seen: dict[int, torch.Tensor] = {}
    solve = editor.method.solve

    def noted(layer: int, keys: torch.Tensor) -> torch.Tensor:
        seen[layer] = solve(layer, keys)
        return seen[layer]

    editor.method.solve = noted  # type: ignore[method-assign]
    updates = BatchUpdates(len(REQUESTS), keep_whole=False)
    editor.edit(REQUESTS, updates=updates)
    for layer, x in seen.items():
        found = updates.factors()[editor.edited.weight_name(layer)]
        torch.testing.assert_close(found.right.double(), x, rtol=1e-5, atol=1e-8)


def test_everything_undone_and_redone_is_bit_for_bit(run: Path) -> None:
    before = contents(run)
    undone = change(run, UNDO, Choice(everything=True))
    assert undone.exact == "original"
    original, now = (read_weights(run / f"edit_{n}.safetensors") for n in (0, N))
    assert all(torch.equal(original[name], now[name]) for name in original)
    assert undone_in(run / f"edit_{N}.safetensors") == set(range(N))
    assert not foreign_files(run)
    redone = change(run, REDO, Choice(everything=True))
    assert redone.exact == "edited"
    assert contents(run) == before
    assert redone.chosen == undone.chosen[::-1]


def test_a_batch_and_a_case_are_taken_out(run: Path) -> None:
    whole, second = total(run, N), step(run, 4)
    found = change(run, UNDO, Choice(batch=2))
    assert found.case_ids == (2, 3)
    assert (found.chosen[0].n, found.others[0].n) == (2, 4)
    assert_near(total(run, N), {name: whole[name] - second[name] for name in whole})
    entry = read_entries(run)[2]
    factors, _ = read_updates(run, entry)
    assert change(run, UNDO, Choice(cases=(5,))).n_undone == 3
    expected = {name: whole[name] - second[name] - factors[name].delta([1]) for name in whole}
    assert_near(total(run, N), expected)
    both = contents(run)
    change(run, REDO, Choice(cases=(2, 5)))
    change(run, UNDO, Choice(cases=(5,)))
    change(run, UNDO, Choice(cases=(2,)))
    assert contents(run) == both  # whatever the order
    assert [event["what"] for event in read_history(run)] == ["undo", "undo", "redo", "undo", "undo"]


@pytest.mark.parametrize(
    ("method", "settings"), [("MEMIT_rect", {}), ("FT", {}), ("AlphaEdit", {"rules": "random"})]
)
def test_updates_that_are_no_sums_are_undone_by_batch(method: str, settings, tiny: TinyRun) -> None:
    folder = execute(tiny.config("whole", alg_name=method, dataset_size_limit=4, **settings)).folder
    whole, first = total(folder, 4), step(folder, 2)
    with pytest.raises(SphereError, match=r"no sum over its facts .* undo the whole batch 1"):
        change(folder, UNDO, Choice(cases=(0,)))
    change(folder, UNDO, Choice(batch=1))
    assert_near(total(folder, 4), {name: whole[name] - first[name] for name in whole})


@pytest.mark.parametrize("conditioned", ["unconditioned", "conditioned"])
def test_prune_conditions_what_is_left(conditioned: str, tiny: TinyRun, tmp_path: Path) -> None:
    world = tiny.copy(tmp_path / "world")
    world.write_hparams("MEMIT_prune", prune_continue=conditioned)
    settings = {"alg_name": "MEMIT_prune", "dataset_size_limit": N, "beta_hse": 0.0}
    folder = execute(world.config("prune", **settings)).folder
    with pytest.raises(SphereError, match="no sum over its facts"):
        change(folder, UNDO, Choice(cases=(0,)))
    change(folder, UNDO, Choice(batch=2))
    original, changes = read_weights(folder / "edit_0.safetensors"), {}
    for entry in read_entries(folder)[::2]:
        for name, one in read_updates(folder, entry)[0].items():
            now = changes.get(name, torch.zeros_like(original[name]))
            if conditioned == "conditioned":
                now, _ = CondenseSpectrum().apply(now, original[name])
            changes[name] = now + one.delta().float()
    expected = {name: CondenseSpectrum().apply(t, original[name])[0] for name, t in changes.items()}
    assert_near(total(folder, N), expected, 1e-4)


def test_half_precision_is_added_up_in_single(tiny: TinyRun) -> None:
    folder = execute(tiny.config("half", dtype="bfloat16", dataset_size_limit=4)).folder
    before = contents(folder)
    change(folder, UNDO, Choice(batch=1))
    original, now = (read_weights(folder / f"edit_{n}.safetensors") for n in (0, 4))
    second = {name: one.delta() for name, one in read_updates(folder, read_entries(folder)[1])[0].items()}
    for name, weight in now.items():
        assert torch.equal(weight, (original[name].float() + second[name].float()).bfloat16())
    change(folder, REDO, Choice(batch=1))
    assert contents(folder) == before


def ledger_sum(folder: Path, undone: Collection[int] = ()) -> dict[str, torch.Tensor]:
    """What the facts of all batches add by their factors, less those that are undone."""
    found = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in total(folder, N).items()}
    for entry in read_entries(folder):
        staying = [place for place, case in enumerate(entry.case_ids) if case not in undone]
        for name, one in read_updates(folder, entry)[0].items():
            found[name] += one.delta(staying)
    return found


@pytest.mark.parametrize("saved", [False, True], ids=["before its checkpoint", "after its checkpoint"])
def test_a_continued_run_goes_on_without_what_is_undone(saved: bool, tiny: TinyRun, monkeypatch) -> None:
    """A run that was stopped in its third batch, and a fact of the second is undone: the third is edited onto that."""
    config = tiny.config(f"stopped_{saved}", dataset_size_limit=N, checkpoints="ends")
    with killed.stopped(monkeypatch, 2):
        execute(config)
    folder = next(path.parent for path in Path(config.output_dir).rglob("run.json"))
    if not saved:
        (folder / f"edit_{N}.safetensors").unlink()  # written before the line
    ends = [entry.n_edits for entry in read_entries(folder)]
    assert ends == [2, 4, 6][: 2 + saved]  # without its checkpoint the third batch's file is of no batch
    assert change(folder, UNDO, Choice(cases=(3,))).n_edits == ends[-1]
    again = replace(config, continue_from_run=True)
    if saved:  # what is edited again cannot be left out
        change(folder, UNDO, Choice(cases=(5,)))
        with pytest.raises(
            SphereError, match=r"goes on after 4 edits.* undone of the later ones \(case 5\): redo"
        ):
            execute(again)
        change(folder, REDO, Choice(cases=(5,)))
    execute(again)
    assert undone_cases(folder, N) == {3}
    assert_near(total(folder, N), ledger_sum(folder, {3}))
    change(folder, REDO, Choice(cases=(3,)))
    assert undone_cases(folder, N) == frozenset()
    assert_near(total(folder, N), ledger_sum(folder))


def test_scores_of_a_run_say_what_is_undone(run: Path, tiny: TinyRun) -> None:
    change(run, UNDO, Choice(batch=1))
    model, tokenizer = load_model(str(tiny.model), device="cpu")
    records = load_records("starter", tiny.folder / "data")
    summary = evaluate_run(model, tokenizer, run, records, progress=False)
    assert "2 of 6 edits are undone" in summary["notes"]["undone"]


def test_an_export_is_without_what_is_undone(run: Path, tmp_path: Path) -> None:
    change(run, UNDO, Choice(batch=1))
    folder = export_run(run, "hf", tmp_path / "out", device="cpu").folder
    model, _ = load_model(str(folder), device="cpu")
    for name, weight in read_weights(run / f"edit_{N}.safetensors").items():
        assert torch.equal(model.get_parameter(name), weight)
    card, facts = (folder / "README.md").read_text(), [r for e in read_entries(run) for r in e.requests]
    assert "2 of the 6 edits were undone" in card
    assert [r.text in card for r in facts] == [False, False, True, True, True, True]


def _undo(folder: str, fatal_step: int) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    torch.set_num_threads(1)
    killed._die_at(fatal_step)
    change(folder, UNDO, Choice(batch=2))


def test_a_killed_undo_leaves_one_state_or_the_other(finished: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(finished, tmp_path / "reference"))
    before = contents(reference)
    change(reference, UNDO, Choice(batch=2))
    after = contents(reference)
    folder, seen = Path(shutil.copytree(finished, tmp_path / "run")), []
    for fatal_step in range(1, 60):
        process = killed.CONTEXT.Process(target=_undo, args=(str(folder), fatal_step), daemon=True)
        process.start()
        process.join(killed.SECONDS)
        state = contents(folder)
        assert state in (before, after)
        seen.append(state == after)
        assert undone_cases(folder, N) == ({2, 3} if state == after else set())
        if state == after:
            shutil.rmtree(folder)
            shutil.copytree(finished, folder)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    else:
        pytest.fail("never finished")
    assert seen[0] is False
    assert seen[-1] is True
    assert sum(seen) > 1  # killed behind the replacement, too
    change(folder, UNDO, Choice(batch=2))
    assert contents(folder) == after


def test_a_cut_ledger_is_named_and_a_cut_history_read(run: Path, monkeypatch, capsys) -> None:
    change(run, UNDO, Choice(batch=3))
    history = run / "ledger" / "history.jsonl"
    history.write_text(history.read_text() + '{"when": "2026')
    assert len(read_history(run)) == 1
    change(run, REDO, Choice(batch=3))
    assert [event["what"] for event in read_history(run)] == ["undo", "redo"]
    path = run / "ledger" / "batch_4.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    before = contents(run)
    for words in ["log", str(run)], ["undo", str(run), "--batch", "1"]:
        code, _, err = command(main, words, monkeypatch, capsys)
        assert code == 2
        assert "batch_4.safetensors is damaged" in err
    path.unlink()
    code, _, err = command(main, ["undo", str(run), "--batch", "1"], monkeypatch, capsys)
    assert code == 2
    assert "does not hold the batch after 2 edits" in err
    assert contents(run) == before


def test_what_cannot_be_undone_is_said_in_a_sentence(run: Path, tiny: TinyRun, monkeypatch, capsys) -> None:
    def bad(*words: str) -> str:
        code, _, err = command(main, [*words], monkeypatch, capsys)
        assert code == 2
        return err

    assert "batches 1 to 3, no batch 4" in bad("undo", str(run), "--batch", "4")
    assert "Case 77 is no edit of this run" in bad("undo", str(run), "--case", "77")
    assert "Batch 1 is not undone already" in bad("redo", str(run), "--batch", "1")
    assert "All edits are not undone already" in bad("redo", str(run), "--all")
    change(run, UNDO, Choice(batch=1))
    before = contents(run)
    assert "Batch 1 is undone already: redo it" in bad("undo", str(run), "--batch", "1")
    assert "Case 1 (batch 1) is undone already" in bad("undo", str(run), "--case", "2", "1")
    assert "No folder" in bad("undo", str(run / "none"), "--all")
    assert contents(run) == before
    none = execute(tiny.config("none", dataset_size_limit=4, ledger="none")).folder
    assert "were not kept" in bad("undo", str(none), "--batch", "1")
    assert [entry.case_ids for entry in read_entries(none)] == [(0, 1), (2, 3)]  # on record all the same
    for path in (none / "ledger").iterdir():
        path.unlink()
    assert "has no ledger" in bad("log", str(none))


def test_the_log_lists_and_searches(run: Path, monkeypatch, capsys) -> None:
    change(run, UNDO, Choice(cases=(4,)))

    def said(*words: str) -> list[str]:
        code, out, err = command(main, ["log", str(run), *words], monkeypatch, capsys)
        assert code == 0, err
        return out.splitlines()

    requests = {r.case_id: r for entry in read_entries(run) for r in entry.requests}
    lines = said()
    assert sum(line.startswith("batch ") for line in lines) == 3
    assert sum(line.startswith("  case ") for line in lines) == N
    assert next(line for line in lines if line.endswith("undone")).startswith("  case 4 ")
    assert "undo of case 4" in lines[-1]
    (found,) = (json.loads(line) for line in said("--json", requests[3].subject.upper()))
    assert (found["batch"], found["case_id"], found["undone"]) == (2, 3, False)
    assert found["loss"] > 0
    assert found["target_new"] == requests[3].target_new
    assert [json.loads(line)["case_id"] for line in said("--json", "--batch", "3")] == [4, 5]
    assert said("nothing of the kind")[-1].startswith("0 of 6 edits")


def test_undo_prints_what_it_did(run: Path, monkeypatch, capsys) -> None:
    code, out, err = command(main, ["undo", str(run), "--batch", "1"], monkeypatch, capsys)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "2 edits undone; 4 of 6 are in the weights."
    assert [line.split()[:2] for line in lines[2:4]] == [["undone", "2"], ["others", "4"]]
    assert str(list_checkpoints(run)[-1].path) in lines[-1]
