"""What a score is a score of: another model than the run's is refused, a result is used for what made it only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from task_data import write_task_data
from tiny_run import TinyRun

from sphere.checkpoints import read_weights
from sphere.data.records import load_records
from sphere.downstream import run_downstream, runner
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.scoring import RecordScorer
from sphere.evaluation.states import tokenizer_digest
from sphere.models import load_model
from sphere.report.collect import load_run
from sphere.runs.run import execute

RUN = "runs/FT/tiny/starter_weight_data_batch_2_0.5_0.8"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> TinyRun:
    world = TinyRun(tmp_path_factory.mktemp("world"), tiny_tokenizer, n_records=4)
    write_task_data(world.folder / "tasks")
    execute(world.config(alg_name="FT"))
    return world


@pytest.fixture
def world(made, tmp_path) -> TinyRun:
    return made.copy(tmp_path)


def base(world: TinyRun, dtype: str = "float32") -> Any:
    return load_model(str(world.model), "cpu", dtype)[0]


def score_edits(world: TinyRun, model: Any) -> dict[str, Any]:
    tokenizer = load_model(str(world.model), "cpu")[1]
    records = load_records("starter", world.folder / "data")
    return evaluate_run(model, tokenizer, world.folder / RUN, records, progress=False)


def score_tasks(world: TinyRun, model: Any) -> dict[str, Any]:
    tokenizer = load_model(str(world.model), "cpu")[1]
    return run_downstream(model, tokenizer, world.folder / RUN, world.folder / "tasks", 3, ["nli"])


KINDS = {"edits": score_edits, "downstream": score_tasks}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def work(monkeypatch) -> list[int]:
    """How many records were scored, or examples decoded, in each call that did something."""
    done: list[int] = []
    score, decode = RecordScorer.score, runner.greedy_batches

    def scoring(self: RecordScorer, records: Any, progress: Any = True) -> Any:
        done.append(len(records))
        return score(self, records, progress)

    def decoding(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        done.extend([len(prompts)] if prompts else [])
        return decode(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(RecordScorer, "score", scoring)
    monkeypatch.setattr(runner, "greedy_batches", decoding)
    return done


def other_seed(world: TinyRun) -> Any:
    return tiny_llama(seed=7)


def one_layer_less(world: TinyRun) -> Any:
    """The edited layers are the same."""
    model = base(world)
    del model.model.layers[3]
    model.config.num_hidden_layers = 3
    return model


def other_unedited_weights(world: TinyRun) -> Any:
    model = base(world)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    return model


@kinds
@pytest.mark.parametrize("with_original", [True, False])
@pytest.mark.parametrize("other", [other_seed, one_layer_less, other_unedited_weights])
def test_another_model_than_the_runs_is_refused_in_one_sentence(kind, with_original, other, world):
    before = KINDS[kind](world, base(world))
    if not with_original:
        (world.folder / RUN / "edit_0.safetensors").unlink()
    model = other(world)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    files = {path: path.read_bytes() for path in (world.folder / RUN).rglob("*.json*") if path.name[0] != "."}
    with pytest.raises(SphereError, match="started from") as error:
        KINDS[kind](world, model)
    assert "\n" not in str(error.value)
    assert error.value.arguments == ("model_name",)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(path.read_bytes() == content for path, content in files.items())
    assert KINDS[kind](world, base(world)) == before  # without edit_0, too


@kinds
def test_finished_results_are_used_again_for_the_same_model_only(kind, world, work):
    score = KINDS[kind]
    first = score(world, base(world))
    assert first["notes"] == {}
    scored = sum(work)
    work.clear()
    assert score(world, base(world)) == first
    assert work == []
    in_bfloat16 = score(world, base(world, "bfloat16"))
    assert sum(work) == scored
    assert in_bfloat16["dtype"] != first["dtype"]
    work.clear()
    assert score(world, base(world)) == first
    assert sum(work) == scored


@kinds
def test_a_published_run_scored_with_two_models_has_two_results(kind, world, work):
    """Without run.json nothing says which model it began with, but no result of one is used for the other."""
    folder = world.folder / RUN
    torch.save({"weight": read_weights(folder / "edit_4.safetensors")}, folder / "edit_4.pth")
    for path in (*folder.glob("*.safetensors"), folder / "run.json"):
        path.unlink()
    first = KINDS[kind](world, base(world))
    scored = sum(work)
    assert "could not be verified" in first["notes"]["model"]
    work.clear()
    second = KINDS[kind](world, other_unedited_weights(world))
    assert sum(work) == scored
    assert first["checkpoints"] != second["checkpoints"]


@pytest.mark.parametrize(
    ("stored", "edited", "scored", "verified"),
    [
        ("bfloat16", "float32", "bfloat16", True),  # rounding twice is rounding once
        ("bfloat16", "bfloat16", "float32", True),
        ("float32", "bfloat16", "float32", True),
        ("float32", "float32", "bfloat16", False),  # what was rounded away cannot be compared
    ],
)
def test_the_runs_model_in_another_dtype(stored, edited, scored, verified, tiny_tokenizer, tmp_path):
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=2)
    tiny_llama().to(getattr(torch, stored)).save_pretrained(world.model)
    execute(world.config(alg_name="FT", dtype=edited))
    summary = score_edits(world, base(world, scored))
    assert ("model" in summary["notes"]) != verified
    if not verified:
        assert "scored in bfloat16 and the run started in float32" in summary["notes"]["model"]
    elif scored == "float32":  # there, another model is found out
        with pytest.raises(SphereError, match="is not the model"):
            score_edits(world, other_unedited_weights(world))
    with pytest.raises(SphereError, match="started from"):
        score_edits(world, tiny_llama(seed=7).to(getattr(torch, scored)))


def as_before(world: TinyRun) -> None:
    """The results in the run's folder as the version before wrote them: keyed by the edited weights alone."""
    folder = world.folder / RUN
    for path in folder.glob("summary/cases_*.jsonl"):
        header, *cases = path.read_text().splitlines(keepends=True)
        old = {"format": 1, "checkpoint": "unedited", "fingerprint": json.loads(header)["weights"]}
        path.write_text(json.dumps(old) + "\n" + "".join(cases))
    for path in folder.glob("rect_eval/*/*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            del record["key"]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        (path.parent / "state.json").write_text('{"sha256": null}')
    path = folder / "rect_eval" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["key"], summary["notes"]
    for entry in summary["checkpoints"].values():
        del entry["key"]
    path.write_text(json.dumps(summary))


def test_results_of_the_version_before_are_reported_and_scored_anew(world, work):
    first = score_edits(world, base(world)), score_tasks(world, base(world))
    scored = sum(work)
    as_before(world)
    run = load_run(world.folder / RUN)
    assert run.summary == first[0]
    assert run.downstream is not None
    assert run.downstream["checkpoints"]["edit_4"]["tasks"] == first[1]["checkpoints"]["edit_4"]["tasks"]
    work.clear()
    assert (score_edits(world, base(world)), score_tasks(world, base(world))) == first
    assert sum(work) == scored


def test_nothing_beside_the_results_is_touched(world):
    score_tasks(world, base(world))
    mine = world.folder / RUN / "rect_eval" / "edit_0" / "my_notes.txt"
    mine.write_text("of the unedited model")
    score_tasks(world, base(world, "bfloat16"))
    assert mine.read_text() == "of the unedited model"


def test_a_tokenizer_counts_by_what_it_does(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    before = tokenizer_digest(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer_digest(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == padded
    tokenizer.add_tokens(["wide"])
    assert len({before, padded, tokenizer_digest(tokenizer)}) == 3


def test_where_the_fingerprints_stand(world):
    """run.json says which model the run began with; the unedited row's key is of the same."""
    score_edits(world, base(world))
    config = json.loads((world.folder / RUN / "run.json").read_text())
    header = json.loads(Path(world.folder / RUN / "summary/cases_edit_0.jsonl").read_text().split("\n")[0])
    assert header["weights"] == config["model"]
