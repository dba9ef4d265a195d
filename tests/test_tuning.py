"""Tuning: what is searched, what a trial is worth, the same after a break as without, and the file that it writes."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA_MODULES, tiny_hparams
from tiny_run import TinyRun, command, records, space_sayer
from transformers import PreTrainedTokenizerBase

import sphere.commands.main
from sphere import load_hparams, load_model
from sphere.distributed import Processes
from sphere.errors import SphereError
from sphere.methods import get_method
from sphere.methods.null_space import null_space_projector
from sphere.runs.run import editor_of, execute
from sphere.tuning.objective import Objective, Outcome, objective
from sphere.tuning.options import TuneOptions
from sphere.tuning.search import N_UNPRUNED, Search
from sphere.tuning.search_space import RANGES, SearchSpace, Spectrum
from sphere.tuning.tune import Tuned, tune
from sphere.tuning.tuning_set import tuning_set

OPTIONS = TuneOptions(layers=(1, 2), n_facts=4, n_trials=6, timeout_minutes=None)
Streams = pytest.CaptureFixture[str]


def facts(n: int) -> list[dict[str, Any]]:
    """Made-up facts of which a random model gets some right and some wrong."""
    names = ("Ann", "Bo", "Oz", "Kim", "Lee", "Una")
    cities = ("Rome", "Oslo", "Bonn", "Paris")
    made = records(n)
    for number, record in enumerate(made):
        rewrite = record["requested_rewrite"]
        rewrite["target_new"]["str"], rewrite["target_true"]["str"] = (
            cities[number % 4],
            cities[(number + 1) % 4],
        )
        record["neighborhood_prompts"] = [f"{name} is in" for name in names]
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with facts to trace, and second moments of the layers that tests edit."""
    tiny = TinyRun(tmp_path_factory.mktemp("world"), tiny_tokenizer)
    tiny.write_records(facts(10))
    for method in ("AlphaEdit", "MEMIT_rect", "ROME"):
        tiny.write_hparams(method, v_num_grad_steps=6)
    table = {
        "relation_id": "P1",
        "prompts": ["{} is in"],
        "paraphrases": ["{} lies in", "Find {} in"],
        "generations": ["{}", "{} is", "See {}"],
        "facts": {f"Subject {n}": ("Rome", "Oslo")[n % 2] for n in range(20)},
    }
    (tiny.folder / "facts.json").write_text(json.dumps({"places": table}))
    model, tokenizer = load_model(str(tiny.model), "cpu")
    start = load_hparams(tiny.folder / "hparams/AlphaEdit/tiny.json", get_method("AlphaEdit").hparams_class)
    editor = editor_of(tiny.config(), model, tokenizer, start, None, Processes())
    editor.services.second_moment(1)
    return tiny


@pytest.fixture
def tiny(world: TinyRun, tmp_path: Path) -> TinyRun:
    return world.copy(tmp_path)


def tuned(tiny: TinyRun, output: str = "a", options: TuneOptions = OPTIONS, **settings: Any) -> Tuned:
    """A tuning whose results land in <folder>/<output>."""
    start = str(tiny.folder / "hparams" / settings.get("alg_name", "AlphaEdit") / "tiny.json")
    table = str(tiny.folder / "facts.json")
    options = replace(options, from_hparams=options.from_hparams or start, trace_table=table)
    config = tiny.config(output, **{"hparams_dir": str(tiny.folder / output / "hparams"), **settings})
    return tune(config, options)


def rows(result: Tuned) -> list[dict[str, Any]]:
    """The trials, but for their times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.trials]


# ---- what is searched ----


def spectrum() -> tuple[Spectrum, list[torch.Tensor]]:
    torch.manual_seed(0)
    keys = [torch.randn(200, 12) * torch.logspace(-2, 1, 12) * scale for scale in (1.0, 3.0)]
    moments = [k.double().T @ k.double() / len(k) for k in keys]
    return Spectrum(moments), moments


@pytest.mark.parametrize("threshold", [1e-6, 1e-4, 1e-3, 0.02, 1.0, 1e6])
def test_a_threshold_is_found_again_from_its_fraction_of_the_spectrum(threshold: float) -> None:
    found, moments = spectrum()
    again = float(f"{found.threshold_at(found.fraction_below(threshold)):.4g}")
    smallest = [float(torch.linalg.eigvalsh(moment)[0]) for moment in moments]
    if threshold < max(
        smallest
    ):  # a layer could not be edited: the smallest null space that each of them has
        dims = [null_space_projector(moment, again).dim for moment in moments]
        assert dims[smallest.index(max(smallest))] == 1
        assert min(dims) == 1
        return
    for moment in moments:
        values = torch.linalg.eigvalsh(moment)
        assert int((values < again).sum()) == int((values < threshold).sum())


def test_fractions_are_those_of_all_layers_eigenvalues() -> None:
    found, moments = spectrum()
    values = torch.cat([torch.linalg.eigvalsh(m) for m in moments])
    for threshold in (1e-3, 0.1, 5.0):
        share = float(values[values < threshold].sum() / values.sum())
        assert found.fraction_below(threshold) == pytest.approx(share, rel=1e-4)
    assert found.mean_square == pytest.approx(float(sum(m.trace() for m in moments)) / 2, rel=1e-5)


def test_the_start_is_in_the_space_and_stands_for_itself() -> None:
    start = replace(tiny_hparams(LLAMA_MODULES, v_lr=3.0, kl_factor=0.0), nullspace_threshold=0.5, L2=7.0)
    space = SearchSpace(start, get_method("AlphaEdit").tuned, 0.5, spectrum()[0])
    assert set(space.ranges) == {"v_lr", "clamp_norm_factor", "nullspace_threshold", "L2"}  # kl_factor is 0
    assert space.ranges["v_lr"] == (RANGES["v_lr"][0], 6.0)  # of half a unit each
    assert SearchSpace(start, ("v_lr",), 100.0).ranges["v_lr"] == RANGES["v_lr"]  # 3 is 0.03 of such states
    found = space.hparams(space.start_params)
    assert (found.v_lr, found.L2) == (3.0, 7.0)
    same = {"nullspace_threshold": start.nullspace_threshold}
    assert replace(found, **same) == start


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("AlphaEdit", {"nullspace_threshold", "L2"}),
        ("MEMIT_prune", {"mom2_update_weight"}),
        ("ROME", set()),
    ],
)
def test_each_method_names_its_numbers(method: str, own: set[str]) -> None:
    assert set(get_method(method).tuned) == {"v_lr", "clamp_norm_factor", "kl_factor"} | own


def test_the_tuning_set_is_none_of_the_first_half() -> None:
    facts = tuning_set("starter", "data", 40, seed=0)
    assert len({record.case_id for record in facts}) == 40
    assert min(record.case_id for record in facts) >= 185
    assert facts == tuning_set("starter", "data", 40, seed=0)
    assert facts != tuning_set("starter", "data", 40, seed=1)


def test_only_facts_with_all_kinds_of_prompts_are_drawn(tiny: TinyRun) -> None:
    made = facts(10)
    made[6]["paraphrase_prompts"] = made[8]["neighborhood_prompts"] = []
    tiny.write_records(made)
    drawn = tuning_set("starter", tiny.folder / "data", 3, seed=0)
    assert {record.case_id for record in drawn} == {5, 7, 9}
    with pytest.raises(
        SphereError, match="holds 3 facts with paraphrase and neighborhood prompts, 4 are wanted"
    ):
        tuning_set("starter", tiny.folder / "data", 4, seed=0)
    tiny.write_records([record | {"neighborhood_prompts": []} for record in made])
    with pytest.raises(SphereError, match=r"No fact .* both paraphrase and neighborhood prompts") as error:
        tuned(tiny)
    assert error.value.arguments == ("ds_name",)


# ---- what a trial is worth ----


def test_perplexity_above_the_limit_costs_score() -> None:
    assert objective(80.0, 1.0, limit=1.2) == 80.0
    assert objective(80.0, 1.2, limit=1.2) == 80.0
    assert objective(80.0, 2.4, limit=1.2) == pytest.approx(40.0)
    assert objective(80.0, None, limit=1.2) == 0.0


def test_a_trial_leaves_the_model_as_it_was(tiny: TinyRun) -> None:
    model, tokenizer = load_model(str(tiny.model), "cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    start = load_hparams(tiny.folder / "hparams/AlphaEdit/tiny.json", get_method("AlphaEdit").hparams_class)
    records = tuning_set("starter", tiny.folder / "data", 4, 0)
    trials = Objective(tiny.config(), model, tokenizer, start, records, max_perplexity=1.0)
    editor = editor_of(tiny.config(), model, tokenizer, start, trials.templates, Processes())
    h0 = editor.services.compute_z([record.request for record in records]).h0
    assert trials.coordinate == pytest.approx(float(h0.abs().mean()), rel=1e-5)
    seen: list[Outcome] = []
    whole = trials.evaluate(start, lambda outcome: not seen.append(outcome))
    assert [outcome.n_edits for outcome in (*seen, whole)] == [2, 4]
    assert whole.value == pytest.approx(objective(whole.score, whole.perplexity, 1.0))
    assert trials.evaluate(start, lambda outcome: False).n_edits == 2
    failed = trials.evaluate(replace(start, nullspace_threshold=1e-30), lambda outcome: True)
    assert failed.value == 0
    assert "nullspace_threshold" in str(failed.error)
    assert replace(trials.evaluate(start, lambda outcome: True), seconds=0) == replace(whole, seconds=0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---- the search ----


def test_a_trial_below_the_median_of_the_earlier_ones_is_stopped(tmp_path: Path) -> None:
    space = SearchSpace(tiny_hparams(LLAMA_MODULES), ("v_lr",), 1.0)
    search = Search(tmp_path / "study.journal", seed=0)
    for value in (50.0, 70.0)[:N_UNPRUNED]:
        trial, _ = search.next(space)
        assert search.worth_going_on(trial, 20, value)
        search.finish(trial, value, False, {})
    trial, _ = search.next(space)
    assert not search.worth_going_on(trial, 20, 45.0)
    search.finish(trial, 45.0, True, {})
    trial, _ = search.next(space)
    assert search.worth_going_on(trial, 20, 65.0)
    assert [search.is_pruned(t) for t in search.finished] == [False] * N_UNPRUNED + [True]


def interrupted(monkeypatch: pytest.MonkeyPatch, call: int, after_a_batch: bool) -> None:
    """From now on the so-many-th trial ends with KeyboardInterrupt."""
    evaluate, calls = Objective.evaluate, []

    def evaluating(self: Objective, hparams: Any, go_on: Any) -> Outcome:
        calls.append(hparams)
        if len(calls) < call:
            return evaluate(self, hparams, go_on)

        def stop(outcome: Outcome) -> bool:
            go_on(outcome)
            raise KeyboardInterrupt

        if not after_a_batch:
            raise KeyboardInterrupt
        return evaluate(self, hparams, stop)

    monkeypatch.setattr(Objective, "evaluate", evaluating)


def test_stopped_and_continued_it_ends_the_same(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(tiny, "whole")
    assert [row["trial"] for row in whole.trials] == list(range(OPTIONS.n_trials))
    for call, after_a_batch in ((1, True), (3, False)):  # of each session
        with monkeypatch.context() as patch:
            interrupted(patch, call, after_a_batch)
            with pytest.raises(KeyboardInterrupt):
                tuned(tiny, "broken")
    journal = tiny.folder / "broken/tune/AlphaEdit/tiny/study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')  # what a kill leaves of a line, and of a lock
    Path(f"{journal}.lock").symlink_to(journal)
    broken = tuned(tiny, "broken")
    assert rows(broken) == rows(whole)
    assert broken.hparams == whole.hparams
    more = tuned(tiny, "broken", replace(OPTIONS, n_trials=7))
    assert rows(more)[:6] == rows(whole)
    assert len(more.trials) == 7


def test_no_trial_begins_that_would_end_too_late(tiny: TinyRun) -> None:
    assert len(tuned(tiny, options=replace(OPTIONS, timeout_minutes=1e-6)).trials) == 1


# ---- the file ----


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT_rect", "ROME"])
def test_the_file_is_loaded_as_any_other(tiny: TinyRun, method: str) -> None:
    layers = (2,) if method == "ROME" else (1, 2)
    result = tuned(tiny, options=replace(OPTIONS, layers=layers, n_trials=2), alg_name=method)
    assert result.path == tiny.folder / "a/hparams" / method / "tiny.json"
    assert load_hparams(result.path, get_method(method).hparams_class) == result.hparams
    start = json.loads((tiny.folder / "hparams" / method / "tiny.json").read_text())
    content = json.loads(result.path.read_text())
    changed = {key for key in start if content[key] != start[key]}
    assert changed <= {*get_method(method).tuned, "layers"}
    assert content["layers"] == list(layers)
    best = max(result.trials, key=lambda row: (row["state"] != "stopped") * row["value"])
    assert result.best["value"] == best["value"]
    assert {name: content[name] for name in get_method(method).tuned} == {
        name: result.best[name] for name in get_method(method).tuned
    }
    assert {p.name for p in result.folder.iterdir()} >= {"trials.csv", "history.svg", "tune.json"}


def test_a_run_on_the_facts_of_the_tuning_is_told_so(tiny: TinyRun, caplog: Any) -> None:
    result = tuned(tiny, options=replace(OPTIONS, n_trials=1))
    place = str(result.path.parents[1])
    with caplog.at_level(logging.WARNING, "sphere"):
        execute(tiny.config("first", hparams_dir=place, dataset_size_limit=5))
        assert "tuned on" not in caplog.text
        execute(tiny.config("all", hparams_dir=place, dataset_size_limit=10))
    assert "4 of the 10 records are among those that the hyperparameters were tuned on" in caplog.text


def test_layers_are_traced_once(
    tiny: TinyRun, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    space_sayer(tiny_tokenizer).save_pretrained(tiny.model)
    options = replace(OPTIONS, layers=None, n_trials=1, trace_facts=5, trace_draws=2)
    result = tuned(tiny, options=options)
    trace = json.loads((result.folder / "trace.json").read_text())
    effect = trace["average_indirect_effect"]
    assert trace["n_facts"] == 5
    assert result.hparams.layers == tuple(trace["layers"])
    assert max(trace["layers"]) == max(effect.index(max(effect)), 1)
    assert (result.folder / "causal_trace.svg").exists()
    monkeypatch.setattr("sphere.tuning.tune.causal_trace", None)
    assert tuned(tiny, options=options).hparams == result.hparams


def test_it_begins_with_the_numbers_of_another_family_and_the_models_own_modules(tiny: TinyRun) -> None:
    options = replace(OPTIONS, n_trials=1, from_hparams="hparams/AlphaEdit/gpt2-xl.json")
    result = tuned(tiny, options=replace(options, mom2_dataset="self", mom2_n_samples=8))
    foreign = load_hparams(options.from_hparams, get_method("AlphaEdit").hparams_class)
    found = result.hparams
    assert {key: getattr(found, key) for key in LLAMA_MODULES} == LLAMA_MODULES
    assert (found.v_loss_layer, found.layers, found.mom2_n_samples) == (3, (1, 2), 8)
    same = ("v_lr", "clamp_norm_factor", "kl_factor", "v_weight_decay", "v_num_grad_steps")
    assert [getattr(found, key) for key in same] == [getattr(foreign, key) for key in same]


def test_it_begins_with_the_methods_defaults_where_there_is_no_file(tiny: TinyRun) -> None:
    options = replace(OPTIONS, n_trials=1, mom2_n_samples=8)
    config = tiny.config("a", hparams_dir=str(tiny.folder / "mine"), alg_name="MEMIT")
    (tiny.folder / "mine").mkdir()
    result = tune(config, options)
    assert result.path == tiny.folder / "mine/MEMIT/tiny.json"
    assert load_hparams(result.path, get_method("MEMIT").hparams_class) == result.hparams
    assert rows(tune(config, options)) == rows(result)  # not begun anew from the file that it has written


# ---- what is refused ----


def test_files_and_tunings_of_other_settings_are_not_replaced_unasked(tiny: TinyRun) -> None:
    options = replace(OPTIONS, n_trials=1)
    (path := tiny.folder / "a/hparams/AlphaEdit/tiny.json").parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(SphereError, match="There is a hyperparameter file") as error:
        tuned(tiny, options=options)
    assert error.value.arguments == ("overwrite", "hparams_dir")
    assert path.read_text() == "{}"
    tuned(tiny, options=options, overwrite=True)
    with pytest.raises(SphereError, match=r"begun with other settings \(project\)"):
        tuned(tiny, options=options, project="after")
    decided = tiny.folder / "a/tune/AlphaEdit/tiny/tune.json"
    earlier = {key: value for key, value in json.loads(decided.read_text()).items() if key != "project"}
    decided.write_text(json.dumps(earlier))  # as earlier versions wrote it
    with pytest.raises(SphereError, match=r"begun with other settings \(project\)"):
        tuned(tiny, options=options, project="after")
    assert len(tuned(tiny, options=options).trials) == 1
    with pytest.raises(SphereError, match=r"begun with other settings \(seed\)|case_ids"):
        tuned(tiny, options=options, seed=1)
    assert len(tuned(tiny, options=options, seed=1, overwrite=True).trials) == 1


@pytest.mark.parametrize(
    ("options", "settings", "says", "arguments"),
    [
        ({"layers": None}, {}, "none of the facts", ("layers", "trace_table")),
        ({"layers": (1, 9)}, {}, "v_loss_layer 3 lies below the last edited layer 9", ()),
        ({"n_facts": 6}, {}, "holds 5 facts, 6 are wanted", ("n_facts", "ds_name")),
        ({}, {"facts": "mine.csv"}, "from a published dataset", ("ds_name",)),
        ({}, {"alg_name": "FT"}, "FT names no numbers", ("alg_name",)),
        ({"from_hparams": "nowhere.json"}, {}, "No hyperparameter file at nowhere.json", ("from_hparams",)),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(
    tiny: TinyRun, options: dict[str, Any], settings: dict[str, Any], says: str, arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SphereError, match=says) as error:
        tuned(tiny, options=replace(OPTIONS, **options), **settings)
    assert error.value.arguments == arguments
    assert "\n" not in str(error.value)


def test_a_search_in_which_nothing_works_is_an_error(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Outcome(0, 0.0, error="The update is not finite.")
    monkeypatch.setattr(Objective, "evaluate", lambda self, hparams, go_on: failed)
    with pytest.raises(SphereError, match=r"No trial edited the tuning set with success \(The update is not"):
        tuned(tiny, options=replace(OPTIONS, n_trials=1))


def test_without_optuna_the_sentence_says_what_to_install(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else find(name, *a)
    )
    with pytest.raises(SphereError, match="pip install optuna"):
        tuned(tiny)


@pytest.mark.parametrize(
    "options",
    [{"n_trials": 0}, {"n_facts": 0}, {"timeout_minutes": 0.0}, {"max_perplexity": 0.5}, {"trace_draws": -1}],
)
def test_options_have_their_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(SphereError) as error:
        TuneOptions(**options)
    assert error.value.arguments == tuple(options)


def test_the_command_prints_the_trials(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    words = [
        *("tune", *tiny.flags("a", use_cache=None, cache_dir=None)),
        f"--from_hparams={tiny.folder}/hparams/AlphaEdit/tiny.json",
        *("--layers=1,2", "--n_facts=4", "--n_trials=2", "--overwrite"),
    ]
    code, out, err = command(sphere.commands.main.main, words, monkeypatch, capsys)
    assert (code, "error" in err) == (0, False), err
    assert "0 finished" in out
    assert f"Hyperparameters: {tiny.folder}/hparams/AlphaEdit/tiny.json" in out
