"""The same facts in another order: what the seed decides, where such runs land, and that they go on as themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_run import TinyRun, contents

from sphere.commands.sweep_job import job_of
from sphere.data.records import load_records, shuffled
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.runs.config import RunConfig, command_of
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute


def test_the_seed_decides_the_order() -> None:
    facts = load_records("starter", limit=12)
    orders = [[record.case_id for record in shuffled(facts, seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [record.case_id for record in facts]


def test_seeds_edit_the_same_facts_in_other_orders(tmp_path, tiny_tokenizer) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=12)
    settings = {"alg_name": "FT", "dataset_size_limit": 6, "beta_hse": 0}
    runs = {seed: execute(world.config(shuffle=True, seed=seed, **settings), command="") for seed in (1, 2)}
    orders = [[record.case_id for record in run.records] for run in runs.values()]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(6))  # of the first 6, whatever the seed
    config = json.loads((runs[1].folder / "run.json").read_text())
    assert (config["shuffle"], config["case_ids"]) == (True, orders[0])
    assert "--shuffle" in command_of(config)

    run = runs[2]  # scored in the order of editing, whatever that of the dataset
    run.editor.revert()
    evaluate_run(run.model, run.tokenizer, run.folder, load_records("starter", world.folder / "data"))
    lines = (run.folder / "summary" / "cases_edit_6.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["case"]["case_id"] for line in lines] == orders[1]


def test_ones_own_facts_are_shuffled_once_they_are_complete(tmp_path, tiny_tokenizer) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer)
    rows = ["prompt,subject,target_new", *(f"{{}} is in,{name},Rome" for name in ("Ann", "Bob", "Cy", "Di"))]
    (tmp_path / "own.csv").write_text("\n".join(rows))
    own = {"ds_name": "facts", "facts": str(tmp_path / "own.csv"), "alg_name": "FT", "shuffle": True}
    run = execute(world.config(seed=1, **own))
    order = [record.request.subject for record in run.records]
    assert order != sorted(order)
    assert sorted(order) == ["Ann", "Bob", "Cy", "Di"]
    assert all(record.request.target_true for record in run.records)
    assert execute(world.config(seed=1, continue_from_run=True, **own)).reports == []


def test_a_shuffled_run_continues_as_itself(tmp_path, tiny_tokenizer) -> None:
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=6)
    config = world.config(alg_name="FT", shuffle=True, seed=1)
    whole = contents(execute(config).folder)
    (folder_of(config) / "edit_6.safetensors").unlink()
    assert execute(replace(config, continue_from_run=True)).reports == []
    plain = replace(config, shuffle=False, continue_from_run=True)
    folder_of(config).rename(folder_of(plain))
    with pytest.raises(SphereError, match=r"begun with other settings \(case_ids"):
        execute(plain)
    assert whole.keys() > contents(folder_of(plain)).keys()


def test_the_runs_of_a_table_have_folders_of_their_own() -> None:
    common = {"sweep_dir": "sweep", "generation_interval": 0, "devices": [], "beta_hse": 0.5}
    changes = [
        {},
        {"beta_hse": 0},
        {"rules": "revive"},
        {"rules": "random"},
        {"directions": "original"},
        {"shuffle": True},
        {"rules": "revive", "shuffle": True},
        {"directions": "original", "shuffle": True},
    ]
    folders = {job_of({**common, **change, "seed": seed}).folder for change in changes for seed in (1, 2)}
    assert len(folders) == 2 * len(changes)
    orders = {folder_of(RunConfig(shuffle=True, seed=seed)).name for seed in (1, 2)}
    assert orders == {f"starter_weight_data_batch_20_0.5_0.5_shuffled_{seed}" for seed in (1, 2)}
