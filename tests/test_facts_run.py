"""A table of one's own facts, edited, scored, continued; what it leaves open is asked of the unedited model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from tiny_run import TinyRun, command, contents
from transformers import PreTrainedTokenizerBase

from sphere.commands import check, edit, score
from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation.unedited_answers import N_CONTROLS, complete
from sphere.report.collect import load_runs
from sphere.report.commands import score_command
from sphere.requests import EditRequest
from sphere.runs.facts_file import FACTS_NAME, load_facts, read_run_facts
from sphere.runs.run import execute

Streams = pytest.CaptureFixture[str]
TABLE = """prompt,subject,target_new,target_true,neighborhood,paraphrases
{} is in,Annie,Rome,Paris,Bob is in => Oslo,Where {} is: | Annie's place is
{} lives in,Bertha,Oslo,,Carl lives in,
Carla lives in,Carla,Bonn,Oslo,,
{} sleeps in,Dora,Rome,,,
"""
CONTROLS = [(f"Question {i} is", f"answer {i}") for i in range(5)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny model with its files."""
    return TinyRun(tmp_path_factory.mktemp("facts"), tiny_tokenizer)


def table(folder: Path, text: str = TABLE, name: str = "my facts.csv") -> Path:
    """A table of facts on disk."""
    path = folder / name
    path.write_text(text)
    return path


def test_edited_scored_and_scored_again(
    world: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    path = table(tmp_path)
    flags = world.flags(str(tmp_path / "runs"), facts=path)
    code, out, err = command(edit.main, flags, monkeypatch, capsys)
    assert code == 0, err
    assert "2 of 4 facts name no true target" in out
    (folder,) = tmp_path.glob("runs/AlphaEdit/tiny/my_facts_weight_data_batch_2_*")
    kept = json.loads((folder / FACTS_NAME).read_text())
    assert [entry["subject"] for entry in kept["records"]] == ["Annie", "Bertha", "Carla", "Dora"]
    assert all(entry["target_true"] for entry in kept["records"])
    assert [len(entry["neighborhood"]) for entry in kept["records"]] == [1, 1, N_CONTROLS, N_CONTROLS]
    summary = json.loads((folder / "summary" / "summary.json").read_text())
    assert set(summary["notes"]) >= {"target_true", "neighborhood", "neighborhood_answers"}
    assert summary["checkpoints"][-1]["metrics"]["score"]["value"] >= 0

    path.unlink()  # the run holds all that scoring needs
    (folder / "summary" / "summary.json").unlink()
    again = [f"--weight_folder={folder}", "--ds_name=facts", f"--model_name={world.model}", "--device=cpu"]
    code, _, err = command(score.main, again, monkeypatch, capsys)
    assert code == 0, err
    assert json.loads((folder / "summary" / "summary.json").read_text()) == summary
    # the first so many, of facts as of any dataset; a report's command leaves them whole
    code, _, err = command(score.main, [*again, "--dataset_size_limit=3"], monkeypatch, capsys)
    assert code == 2
    assert "made 4 edits, of which the dataset holds only 3" in err
    (run,) = load_runs([folder])
    assert "--dataset_size_limit" not in score_command(run)


def test_the_log_says_how_many_facts_are_edited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sphere")
    assert len(load_facts(str(table(tmp_path)), None, "stop", 3).records) == 3
    assert "3 of 4 facts, 0 rows skipped" in caplog.text


def test_a_run_that_is_continued_keeps_its_answers(
    world: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ds_name": "facts", "facts": str(table(tmp_path)), "dataset_size_limit": None}
    whole = execute(world.config(str(tmp_path / "whole"), **settings)).folder
    config = world.config(str(tmp_path / "cut"), **settings)
    import sphere.runs.run as module

    edit_ = module.Editor.edit

    def stop_at_the_second(self: module.Editor, *arguments: object) -> module.BatchReport:
        if self.n_edits:
            raise KeyboardInterrupt
        return edit_(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(module.Editor, "edit", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    with monkeypatch.context() as patched:  # nothing is asked of the model a second time
        patched.setattr(
            "sphere.runs.facts_file.complete", lambda *_: pytest.fail("the answers are in the folder")
        )
        again = execute(world.config(str(tmp_path / "cut"), continue_from_run=True, **settings)).folder
    assert contents(again) == contents(whole)
    assert (again / FACTS_NAME).read_bytes() == (whole / FACTS_NAME).read_bytes()


def test_other_facts_are_not_the_same_run(world: TinyRun, tmp_path: Path) -> None:
    settings = {"ds_name": "facts", "facts": str(table(tmp_path)), "dataset_size_limit": None}
    execute(world.config(str(tmp_path / "runs"), **settings))
    table(tmp_path, TABLE.replace("Rome", "Kiel"))
    with pytest.raises(SphereError, match="begun with other settings"):
        execute(world.config(str(tmp_path / "runs"), continue_from_run=True, **settings))


def test_a_new_run_takes_the_place_of_the_old_facts(world: TinyRun, tmp_path: Path) -> None:
    settings = {"ds_name": "facts", "facts": str(table(tmp_path)), "dataset_size_limit": None}
    execute(world.config(str(tmp_path / "runs"), **settings))
    table(tmp_path, TABLE.replace("Rome", "Kiel"))
    folder = execute(world.config(str(tmp_path / "runs"), overwrite=True, **settings)).folder
    records, _ = read_run_facts(folder)
    assert [record.request.target_new for record in records] == ["Kiel", "Oslo", "Bonn", "Kiel"]


def test_a_new_run_asks_the_model_anew(world: TinyRun, tmp_path: Path) -> None:
    """The run that it replaces may have been made of another model of the same name."""
    settings = {"ds_name": "facts", "facts": str(table(tmp_path)), "dataset_size_limit": None}
    folder = execute(world.config(str(tmp_path / "runs"), **settings)).folder
    kept = json.loads((folder / FACTS_NAME).read_text())
    answer = kept["records"][1]["target_true"]
    kept["records"][1]["target_true"] = "the answer of another model"
    (folder / FACTS_NAME).write_text(json.dumps(kept))
    execute(world.config(str(tmp_path / "runs"), overwrite=True, **settings))
    records, _ = read_run_facts(folder)
    assert records[1].request.target_true == answer


def test_facts_that_a_kill_left_out_are_written_when_the_run_goes_on(world: TinyRun, tmp_path: Path) -> None:
    settings = {"ds_name": "facts", "facts": str(table(tmp_path)), "dataset_size_limit": None}
    folder = execute(world.config(str(tmp_path / "runs"), **settings)).folder
    expected = (folder / FACTS_NAME).read_bytes()
    (folder / FACTS_NAME).unlink()
    execute(world.config(str(tmp_path / "runs"), continue_from_run=True, **settings))
    assert (folder / FACTS_NAME).read_bytes() == expected


def test_a_file_of_that_name_in_another_run_is_the_users(world: TinyRun, tmp_path: Path) -> None:
    """A run of a dataset wrote none: it is neither removed nor written over."""
    folder = execute(world.config(str(tmp_path / "runs"), dataset_size_limit=2)).folder
    (folder / FACTS_NAME).write_text("mine")
    with pytest.raises(SphereError, match="vouches for"):
        execute(world.config(str(tmp_path / "runs"), dataset_size_limit=2, overwrite=True))
    assert (folder / FACTS_NAME).read_text() == "mine"


def test_too_long_a_prompt_is_named_before_the_model_is_asked(world: TinyRun, tmp_path: Path) -> None:
    path = table(tmp_path, f"prompt,subject,target_new\n{'so ' * 100}{{}} is in,Annie,Rome\n")
    settings = {"ds_name": "facts", "facts": str(path), "dataset_size_limit": None}
    with pytest.raises(SphereError, match=r"Longer than the 256 positions .*case 1"):
        execute(world.config(str(tmp_path / "runs"), **settings))
    assert not (tmp_path / "runs").exists()


def test_bad_rows_stop_or_are_skipped(world: TinyRun, tmp_path: Path) -> None:
    path = str(table(tmp_path, TABLE + "nobody is in,,Rome,,\n"))
    with pytest.raises(SphereError, match=r"1 of 5 rows .*row 6: no subject"):
        load_facts(path, None, "stop")
    settings = {"ds_name": "facts", "facts": path, "dataset_size_limit": None, "on_bad_record": "skip"}
    run = execute(world.config(str(tmp_path / "runs"), **settings))
    assert len(run.records) == 4
    assert json.loads((run.folder / FACTS_NAME).read_text())["skipped"][0]["row"] == 6
    assert "1 rows" in read_run_facts(run.folder)[1]["skipped"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"facts": "f.csv", "ds_name": "mcf"}, "no other dataset"),
        ({"ds_name": "facts"}, "give that table"),
        ({"ds_name": "facts", "facts": "none.csv"}, "No table of facts"),
    ],
)
def test_settings_that_do_not_fit(world: TinyRun, settings: dict[str, str], says: str) -> None:
    with pytest.raises(SphereError, match=says):
        execute(world.config("none", **settings))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not valid JSON"),
        ('{"format": 9}', "is of format 9"),
        ('{"format": 1}', "not what a run writes"),
    ],
)
def test_a_broken_facts_file(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / FACTS_NAME).write_text(content)
    with pytest.raises(SphereError, match=says):
        read_run_facts(tmp_path)


def test_answers_are_the_unedited_models_own(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama()
    records = [
        Record(0, EditRequest(0, "{} is in", "Ann", "Rome"), neighborhood=(("Bob is in", None),)),
        Record(1, EditRequest(1, "{} is in", "Ann", "Rome", "Paris"), neighborhood=(("Bob is in", "Oslo"),)),
        Record(2, EditRequest(2, "{} is at", "Bo", "Rome"), neighborhood=()),
    ]
    filled, notes = complete(model, tiny_tokenizer, records, CONTROLS)
    assert filled[1] == records[1]
    assert filled[2].neighborhood == tuple(
        CONTROLS[(2 * N_CONTROLS + i) % len(CONTROLS)] for i in range(N_CONTROLS)
    )
    assert set(notes) == {"target_true", "neighborhood", "neighborhood_answers"}
    own = filled[0].request.target_true
    assert own == plain_answer(model, tiny_tokenizer, "Ann is in", len(tiny_tokenizer(" Rome")["input_ids"]))

    known = Record(0, EditRequest(0, "{} is in", "Ann", own or ""), neighborhood=(("Bob is in", "Oslo"),))
    (other,), _ = complete(model, tiny_tokenizer, [known], CONTROLS)
    assert other.request.target_true is not None
    assert other.request.target_true.split() != own.split()


def plain_answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> str:
    """The greedy continuation token by token; blank first answers are passed over."""
    start = tokenizer(prompt)["input_ids"]
    avoided: list[int] = []
    for _ in range(20):
        ids = list(start)
        for step in range(length):
            logits = model(torch.tensor([ids])).logits[0, -1]
            if step == 0:
                logits[avoided] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[len(start) :], skip_special_tokens=True)
        text = text.lstrip("\n").partition("\n")[0].strip()
        if text:
            return text
        avoided.append(ids[len(start)])
    raise AssertionError("no answer")


def test_check_shows_what_will_be_read(
    world: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    path = table(tmp_path, TABLE + "nobody is in,,Rome,,\n{} is in,Annie,Oslo,Bonn,\n")
    flags = [str(path), f"--model_name={world.model}", "--known", "--device=cpu"]
    code, out, err = command(check.main, flags, monkeypatch, capsys)
    assert code == check.EXIT_BAD_ROWS, err
    assert "Anni[e] is in  =>   |R|o|m|e" in out
    assert "Row 6 cannot be used: no subject" in out
    assert "Row 7 contradicts row 2" in out
    assert "5 facts can be edited, 1 rows cannot." in out
    code, out, _ = command(
        check.main, [str(table(tmp_path)), f"--model_name={world.model}"], monkeypatch, capsys
    )
    assert code == 0


def test_check_of_what_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    code, _, err = command(check.main, [str(tmp_path / "none.csv")], monkeypatch, capsys)
    assert code == 2
    assert "No table of facts" in err
