"""The benchmarks run, at sizes that take no time, and say what they measured; no test asserts a time."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, REQUESTS, tiny_gpt2, tiny_hparams, tiny_llama
from tiny_run import records

from benchmarks import (
    alphaedit_solve,
    editing_methods,
    end_to_end,
    growth,
    memit_solve,
    principal_directions,
    stages,
)
from benchmarks.__main__ import write_section
from benchmarks.common import (
    Comparison,
    benchmark_parser,
    compare,
    device_of,
    finish,
    peak_of,
    read_rows,
    relative,
    table,
)
from benchmarks.plain import solves as plain_solves
from benchmarks.plain.editing import PlainEditor
from sphere import Editor, SphereError
from sphere.methods.alphaedit import AlphaEditHParams

CPU = torch.device("cpu")


def a_row(**changes) -> Comparison:
    values = {"name": "solve", "sizes": "in 8", "plain_seconds": 2.0, "fast_seconds": 0.1, "difference": 1e-6}
    return Comparison(**(values | changes))


def test_compare_takes_turns_and_puts_things_back():
    calls: list[str] = []
    row = compare(
        "x",
        "1",
        lambda: calls.append("plain") or 2.0,
        lambda: calls.append("fast") or 2.5,
        difference=lambda fast, plain: fast - plain,
        before=lambda: calls.append("before"),
        turns=2,
        goal=3,
        note=lambda fast: f"{len(fast.seconds)} turns",
    )
    timed = calls[-8:]
    assert timed == ["before", "plain", "before", "fast"] * 2
    assert (row.difference, row.goal, row.note) == (0.5, 3, "2 turns")
    assert row.plain_seconds > 0
    assert row.fast_seconds > 0


def test_peak_memory_counts_what_is_freed_again():
    peak = peak_of(lambda: torch.ones(64 * 2**20, dtype=torch.uint8).max(), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 * 2**20 < peak < 160 * 2**20


def test_rows_survive_their_file(tmp_path):
    args = benchmark_parser("").parse_args(["--json", str(tmp_path / "rows.json")])
    rows = [a_row(goal=10), a_row(name="other", plain_bytes=2**22, fast_bytes=2**20, note="tokens")]
    assert finish(rows, args) == 0
    assert finish([a_row(goal=100)], benchmark_parser("").parse_args([])) == 1  # a ratio of 20
    facts, found = read_rows(tmp_path / "rows.json")
    assert found == rows
    assert facts["torch"] == torch.__version__
    assert "| 20.0 |" in table(rows)
    assert "4 -> 1 MiB" in table(rows)


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(SphereError, match="--device"):
        device_of(benchmark_parser("").parse_args(["--device", "nowhere"]))


def test_relative_difference():
    assert relative(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])) == pytest.approx(0.5)


def test_a_run_replaces_its_own_section(tmp_path):
    path = tmp_path / "results.md"
    write_section(path, "GPU", "first\n")
    write_section(path, "CPU", "second\n")
    write_section(path, "GPU", "third\n")
    text = path.read_text("utf-8")
    assert text.index("## CPU\n\nsecond") < text.index("## GPU\n\nthird")
    assert "first" not in text
    assert text.count("# Benchmarks") == 1


@pytest.mark.parametrize(
    ("script", "flags", "bound"),
    [
        (principal_directions, ["--shape", "20", "30"], 1e-4),
        (principal_directions, ["--shape", "30", "20"], 1e-4),
        (alphaedit_solve, ["--inp", "64", "--n", "4", "--batch", "3"], 1e-4),
        (memit_solve, ["--inp", "64", "--n", "4", "--batches", "3"], 1e-8),
    ],
)
def test_scripts_run_at_small_sizes(script, flags, bound, tmp_path):
    path = tmp_path / "rows.json"
    assert script.main([*flags, "--turns", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert rows
    assert all(row["difference"] < bound for row in rows)


def test_warm_start_study_runs(capsys):
    assert principal_directions.main(["--shape", "20", "30", "--warm_start"]) == 0
    assert "steps from the earlier ones" in capsys.readouterr().out


# ---- growth ----


def test_once_t_is_a_matrix_a_run_grows_no_more(tmp_path):
    """What an editor keeps of the earlier batches, and its resume point, in bytes; and it is taken up exactly."""
    path, results, inp, n = tmp_path / "rows.json", tmp_path / "results.md", 64, 20
    flags = f"--n 300 --num_edits {n} --inp {inp} --json {path} --output {results}".split()
    growth.main(flags)  # the exit code is of times, too
    found = json.loads(path.read_text("utf-8"))
    assert found["equal"]
    rows = found["rows"]
    assert [row["n_edits"] for row in rows] == [20 * i for i in range(1, 16)]
    assert [row["matrix"] for row in rows] == [row["n_edits"] > inp for row in rows]
    later = [row for row in rows if row["matrix"]]
    for size in ("state", "resume"):
        values = [row[size] for row in later]
        assert max(values) <= 1.02 * min(values)
        assert found["uneven"][size] <= 1.02
    assert later[0]["state"] == 8 * inp * inp
    assert rows[2]["state"] == (8 + 4) * inp * 3 * n  # B and the keys
    assert "| 80 (T becomes a matrix) |" in results.read_text("utf-8")


# ---- end to end ----


def with_a_null_space(modules: dict[str, str]) -> AlphaEditHParams:
    return dataclasses.replace(tiny_hparams(modules), nullspace_threshold=0.5)


@pytest.mark.parametrize(("model", "modules"), [(tiny_llama, LLAMA_MODULES), (tiny_gpt2, GPT2_MODULES)])
def test_the_plain_loop_edits_as_the_editor_does(model, modules, tiny_tokenizer):
    edited, hparams = model(), with_a_null_space(modules)
    templates = (("{}",), ("Yes. {}", "So it is. {}"))
    hook = {"beta_hse": 0.5, "alpha": 0.5}
    editor = Editor(
        edited, tiny_tokenizer, "AlphaEdit", hparams, context_templates=templates, progress=False, **hook
    )
    moments = {}
    for layer in hparams.layers:
        inputs = editor.edited.weight(layer).shape[1]
        keys = torch.randn(inputs, 2 * inputs, generator=torch.Generator().manual_seed(layer))
        moments[layer] = keys @ keys.T / (2 * inputs)
        editor.services.second_moments.set(layer, moments[layer])
    projectors = {
        layer: plain_solves.projector(m, hparams.nullspace_threshold) for layer, m in moments.items()
    }
    plain = PlainEditor(edited, tiny_tokenizer, hparams, templates, projectors, **hook)
    original = editor.weights.snapshot()
    found = []
    for each in (editor, plain):
        each.weights.restore(original)
        for batch in (REQUESTS[:2], REQUESTS[2:]):
            each.edit(batch)
        found.append(each.weights.snapshot())
    assert end_to_end.changes_differ(*found, original) < 1e-3


def test_stages_add_up_and_a_generator_is_timed_step_by_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Work:
        def inner(self):
            now[0] += 1
            return "result"

        def steps(self):
            for _ in range(2):
                now[0] += 10
                self.inner()
                yield

    clock = stages.StageClock(CPU, kept=["inner"])
    places = [stages.Place(Work, "inner", "inner"), stages.Place(Work, "steps", "steps")]
    with stages.timed(places, clock), clock.stage("rest"):
        for _ in Work().steps():
            now[0] += 100  # while the generator waits
    Work().inner()  # outside the block nothing is counted
    assert clock.seconds == {"inner": 2, "steps": 20, "rest": 200}
    assert clock.first == {"inner": "result"}


def test_end_to_end_writes_a_section_that_stays(tiny_tokenizer, tmp_path, monkeypatch):
    hparams = with_a_null_space(LLAMA_MODULES)
    monkeypatch.setattr(end_to_end, "default_model", lambda device: (tiny_llama(), tiny_tokenizer, hparams))
    (tmp_path / "starter.json").write_text(json.dumps(records(6)), "utf-8")
    rows_path, results = tmp_path / "rows.json", tmp_path / "results.md"
    flags = "--n 6 --num_edits 2 --steps 4 --plain_batches 2 --products model bfloat16".split()
    places = {"data_dir": tmp_path, "stats_dir": tmp_path, "json": rows_path, "output": results}
    end_to_end.main([*flags, *(f"--{name}={path}" for name, path in places.items())])
    rows = {row.name.removeprefix("end to end: "): row for row in read_rows(rows_path)[1]}
    assert len(rows) == 1 + 2 * (len(end_to_end.STAGES) + 1)
    total = rows["total"]
    assert total.goal == 10
    assert total.difference < 1e-3
    assert "6 edits of starter in batches of 2, plain the first 4, 4 steps" in total.sizes
    assert "efficacy success" in total.note
    for way in ("plain_seconds", "fast_seconds"):
        parts = [getattr(rows[stage], way) for stage in end_to_end.STAGES]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(getattr(total, way))
    write_section(results, "CPU", "the others\n")
    text = results.read_text("utf-8")
    assert text.index("## CPU\n\nthe others") < text.index("## End to end (CPU)\n\nAlphaEdit with SPHERE")
    assert str(tmp_path) not in text


# ---- methods side by side ----


def test_methods_take_turns_each_on_weights_of_its_own(tiny_tokenizer, tmp_path):
    """Each ends where it ends alone, and the model is left as it was."""

    def editor(l2: float, model: Any) -> Editor:
        hparams = dataclasses.replace(with_a_null_space(LLAMA_MODULES), L2=l2)
        return Editor(
            model,
            tiny_tokenizer,
            "AlphaEdit",
            hparams,
            context_templates=(("{}",),),
            stats_dir=tmp_path,
            progress=False,
        )

    model, batches, strengths = tiny_llama(), (REQUESTS[:2], REQUESTS[2:]), (1.0, 100.0)
    contenders = [editing_methods.Contender(editor(l2, model), CPU) for l2 in strengths]
    for batch in batches:
        for contender in contenders:
            contender.take(batch)
    assert [len(contender.seconds) for contender in contenders] == [2, 2]
    for contender, l2 in zip(contenders, strengths, strict=True):
        alone = editor(l2, tiny_llama())
        for name, tensor in alone.weights.snapshot().items():
            assert torch.equal(tensor, contender.editor.weights.snapshot()[name])
        for batch in batches:
            alone.edit(batch)
        for name, tensor in alone.weights.snapshot().items():
            assert torch.equal(tensor, contender.edited[name])


def test_methods_side_by_side_are_at_least_two():
    with pytest.raises(SphereError, match="--methods"):
        editing_methods.main(["--methods", "MEMIT", "MEMIT"])
