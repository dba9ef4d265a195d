"""The guard: what breaks is stopped at the last good batch, can be scored and goes on; what is good passes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from tiny_run import TinyRun, command, contents, records
from transformers import PreTrainedTokenizerBase

import sphere.runs.run
from sphere.checkpoints import read_config, read_weights, write_resume
from sphere.commands import edit
from sphere.data.controls import control_prompts
from sphere.data.records import load_records
from sphere.errors import SphereError
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.perplexity import TEXT_NAME, read_paragraphs
from sphere.evaluation.watch import CONTROLS, PARAGRAPHS, ModelWatch, spread
from sphere.hypersphere import condition_number, hyperspherical_energy
from sphere.models import load_model
from sphere.report import make_report
from sphere.resources import shipped
from sphere.runs.config import RunConfig
from sphere.runs.guard_limits import LIMITS, parse_limits, passed
from sphere.runs.guard_log import GUARD_NAME, read_guard
from sphere.runs.more_facts import continue_run
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute

N, BATCH = 20, 4
SMALL = "perplexity=2,energy=inf,spectrum=inf"  # in so small a weight every edit moves the last two
NONE = ",".join(f"{name}=inf" for name in LIMITS)
BREAKING = {"mom2_update_weight": 1e-4, "clamp_norm_factor": 60.0, "v_lr": 10.0, "v_weight_decay": 0.0}
MILD, SLOW, SHORTER = "mild.json", "slow.json", "shorter.json"


def reader(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A tiny Llama that has read the fixed text and the control prompts, and so has something to lose."""
    model = tiny_llama().train().requires_grad_(True)
    answers = [f"{prompt} {answer}." for prompt, answer in control_prompts()]
    text = " ".join([*read_paragraphs(shipped("data") / TEXT_NAME), *answers])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        starts = torch.randint(0, len(ids) - 65, (8,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + 64] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world in which MEMIT breaks the model, but for its mild hyperparameters."""
    tiny = TinyRun(tmp_path_factory.mktemp("guard"), tiny_tokenizer, N)
    reader(tiny_tokenizer).save_pretrained(tiny.model)
    mild = {"mom2_update_weight": 1e3}
    for name, changes in (MILD, mild), (SLOW, {**mild, "v_lr": 0.1}), (SHORTER, {**BREAKING, "layers": [1]}):
        path = tiny.write_hparams("MEMIT", v_num_grad_steps=12, **changes)
        path.rename(path.with_name(name))
    tiny.write_hparams("MEMIT", v_num_grad_steps=12, **BREAKING)
    return tiny


def config_in(tiny: TinyRun, output: str, **settings: Any) -> RunConfig:
    """A guarded run of MEMIT that breaks."""
    given = {"alg_name": "MEMIT", "beta_hse": 0.0, "num_edits": BATCH, "guard": True, "guard_limits": SMALL}
    return tiny.config(output, **{**given, "on_breakdown": "continue", **settings})


@pytest.fixture(scope="module")
def watched(base: TinyRun) -> Path:
    """The run that breaks, with nothing to stop it."""
    config = config_in(base, "watched", guard_limits=NONE)
    execute(config)
    return folder_of(config)


@pytest.fixture(scope="module")
def stopped(base: TinyRun) -> tuple[RunConfig, str]:
    """The same run, stopped by its guard, and the sentence that it ended with."""
    config = config_in(base, "stopped")
    with pytest.raises(SphereError) as error:
        execute(config)
    return config, str(error.value)


@pytest.fixture
def again(base: TinyRun, stopped: tuple[RunConfig, str], tmp_path: Path) -> RunConfig:
    """A copy of the stopped run, to be continued."""
    base.copy(tmp_path)
    return replace(stopped[0], output_dir=str(tmp_path / "stopped"), continue_from_run=True)


# ---- stopping ----


def test_a_run_that_breaks_is_stopped_at_the_last_good_batch(
    watched: Path, stopped: tuple[RunConfig, str]
) -> None:
    folder, sentence = folder_of(stopped[0]), stopped[1]
    all_of_it, lines = read_guard(watched), read_guard(folder)
    limits = parse_limits(SMALL)
    *kept, last = lines
    assert [line["passed"] for line in kept] == [[]] * len(kept)
    assert last["passed"] == passed(last["moved"], limits) != []
    assert kept
    for line, seen in zip(lines, all_of_it, strict=False):  # watching changes nothing
        assert {**line["moved"], **line["values"]} == {**seen["moved"], **seen["values"]}
    n_edits = kept[-1]["n_edits"]
    name = f"edit_{n_edits}.safetensors"
    assert contents(folder)[name] == contents(watched)[name]
    assert f"edit_{last['n_edits']}.safetensors" not in contents(folder)
    for part in (
        f"Batch {len(lines)} of {N // BATCH}",
        "the perplexity of the fixed text",
        f"is {last['moved']['perplexity']:.3g} (limit 2, {kept[-1]['moved']['perplexity']:.3g} after the batch before)",
        f"the last good state, after {n_edits} edits, is kept in",
    ):
        assert part in sentence


def test_before_it_has_lost_half(watched: Path, stopped: tuple[RunConfig, str]) -> None:
    """Of the log-likelihood of a text that the model has read, half of what the run loses without a guard."""
    lost = [math.log(line["moved"]["perplexity"]) for line in read_guard(watched)]
    kept = [line for line in read_guard(folder_of(stopped[0])) if not line["passed"]]
    assert max(math.log(line["moved"]["perplexity"]) for line in kept) < 0.5 * max(lost)


def test_a_good_run_passes(base: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(base, "good", hparams_fname=MILD)
    with caplog.at_level("INFO", logger="sphere"):
        run = execute(config)
    lines = read_guard(run.folder)
    assert [line["n_edits"] for line in lines] == list(range(BATCH, N + 1, BATCH))
    assert not any(line["passed"] for line in lines)
    guarded = contents(run.folder)
    plain = execute(config_in(base, "plain", hparams_fname=MILD, guard=False, guard_limits=None))
    assert guarded == contents(plain.folder)  # a guard changes no weight
    assert not (plain.folder / GUARD_NAME).exists()
    (cost,) = [record for record in caplog.records if "The guard took" in record.message]
    spent = sum(line["seconds"] for line in lines)
    assert f"{spent:.1f} s, {100 * spent / sum(line['edit_seconds'] for line in lines):.1f} %" in cost.message


def test_the_command_ends_with_the_sentence_and_a_status(
    base: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"alg_name": "MEMIT", "beta_hse": 0, "num_edits": BATCH, "guard": True, "guard_limits": SMALL}
    flags = base.flags("command", **settings, on_breakdown="continue", log_energy_every=0)
    status, out, err = command(edit.main, flags, monkeypatch, capsys)
    assert status == 2
    assert "Weights and log" not in out
    assert "error: Batch 2 of 5: the guard has stopped the run" in err
    assert err.rstrip().endswith("(--guard_limits).")


def test_a_weight_that_is_conditioned_is_looked_at_as_it_is_saved(
    base: TinyRun, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = config_in(base, "prune", alg_name="MEMIT_prune", guard_limits=NONE, dataset_size_limit=8)
    run = execute(config)
    first, last = read_guard(run.folder)
    run.editor.revert()
    weights = run.editor.weights
    watch = ModelWatch(run.model, tiny_tokenizer, {name: weights.get(name) for name in weights.names})
    weights.restore(read_weights(run.folder / "edit_8.safetensors"))
    found = {
        **watch.text_and_controls(),
        "edits_hold": watch.edits_hold(run.records),
        **watch.weights({name: weights.get(name) for name in weights.names}),
    }
    assert last["values"] == pytest.approx(found, rel=1e-4)
    assert first["values"] != last["values"]


# ---- going on ----


def test_a_stopped_run_can_be_scored(again: RunConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, _ = load_model(again.model_name, "cpu")
    records = load_records("starter", again.data_dir)
    summary = evaluate_run(model, tiny_tokenizer, folder_of(again), records)
    assert [row["n_edits"] for row in summary["checkpoints"]] == [0, BATCH]


def test_continued_as_it_was_it_stops_again(again: RunConfig) -> None:
    folder = folder_of(again)
    before, lines = contents(folder, "*.safetensors"), deciding(folder)
    with pytest.raises(SphereError, match="the guard has stopped the run"):
        execute(again)
    assert contents(folder, "*.safetensors") == before
    assert deciding(folder) == lines


def test_without_the_guard_it_breaks(again: RunConfig, watched: Path) -> None:
    folder = folder_of(again)
    execute(replace(again, guard=False, guard_limits=None))
    assert contents(folder) == contents(watched)
    assert [line["n_edits"] for line in read_guard(folder)] == [BATCH]


def test_it_goes_on_with_other_hyperparameters(again: RunConfig) -> None:
    folder = folder_of(again)
    begun = read_config(folder)
    execute(replace(again, hparams_fname=MILD))
    lines = read_guard(folder)
    assert [line["n_edits"] for line in lines] == list(range(BATCH, N + 1, BATCH))
    assert not any(line["passed"] for line in lines)
    config = read_config(folder)
    assert config["hparams"]["mom2_update_weight"] == 1e3
    assert config["hparams_fname"] == MILD
    assert config["hparams_before"] == [{"n_edits": BATCH, "hparams": begun["hparams"]}]
    assert execute(replace(again, hparams_fname=MILD)).reports == []  # and is the run that it is now
    with pytest.raises(SphereError, match=r"begun with other settings \(hparams\)"):
        execute(again)


def test_a_refused_change_leaves_the_run(again: RunConfig) -> None:
    path = folder_of(again) / "run.json"
    before = path.read_bytes()
    with pytest.raises(SphereError, match=r"begun with other settings \(seed\)"):
        execute(replace(again, hparams_fname=MILD, seed=5))
    assert path.read_bytes() == before


@pytest.mark.parametrize("fname", [None, SLOW])
def test_a_run_that_is_stopped_at_further_facts_goes_on(
    base: TinyRun, tmp_path: Path, fname: str | None
) -> None:
    config = config_in(base, f"stopped-{fname}", hparams_fname=MILD, dataset_size_limit=BATCH)
    folder = execute(config).folder
    facts = [record["requested_rewrite"] for record in records(2 * BATCH)[BATCH:]]
    rows = [
        {"prompt": f["prompt"], "subject": f["subject"], "target_new": f["target_new"]["str"]} for f in facts
    ]
    table = tmp_path / "more.json"
    table.write_text(json.dumps(rows))
    with pytest.raises(SphereError, match="the guard has stopped the run"):
        continue_run(folder, {"facts": str(table), "guard_limits": "perplexity=0.001"})
    begun = read_config(folder)
    assert len(begun["case_ids"]) == 2 * BATCH
    other = {} if fname is None else {"hparams_fname": fname}
    run, _ = continue_run(folder, {"guard_limits": "none", **other})
    assert run.editor.n_edits == 2 * BATCH
    config = read_config(folder)
    if fname is None:
        assert config == begun
    else:
        assert config["hparams"]["v_lr"] == 0.1
        assert config["hparams_before"] == [{"n_edits": BATCH, "hparams": begun["hparams"]}]


def test_but_not_with_those_that_decide_what_is_written(again: RunConfig) -> None:
    folder = folder_of(again)
    before = (folder / "run.json").read_bytes()
    with pytest.raises(SphereError, match="but layers decide what it has written already") as refused:
        execute(replace(again, hparams_fname=SHORTER))
    assert refused.value.arguments == ("hparams_fname",)
    assert (folder / "run.json").read_bytes() == before


def test_a_kill_between_look_and_resume_point(
    base: TinyRun, watched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(base, "killed", guard_limits=NONE)
    folder, calls = folder_of(config), iter(range(N))

    def dies(*arguments: Any) -> int:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return write_resume(*arguments)

    monkeypatch.setattr(sphere.runs.run, "write_resume", dies)
    with pytest.raises(KeyboardInterrupt):
        execute(config)
    monkeypatch.undo()
    with (folder / GUARD_NAME).open("a") as file:
        file.write('{"batch": 3, "n_ed')  # and what a kill may cut
    execute(replace(config, continue_from_run=True))
    assert deciding(folder) == deciding(watched)
    assert contents(folder) == contents(watched)


def test_a_damaged_line_is_named(again: RunConfig) -> None:
    path = folder_of(again) / GUARD_NAME
    path.write_text("what?\n" + path.read_text())
    with pytest.raises(SphereError, match=r"Line 1 of .*guard\.jsonl is not what a guard writes"):
        execute(again)


# ---- limits ----


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("speed=1", r"of perplexity, control, edits, energy, spectrum; got 'speed=1'"),
        ("perplexity", "NAME=NUMBER.*got 'perplexity'"),
        ("perplexity=much", "The limit of perplexity is a number above 0, or inf for none; got 'much'"),
        ("edits=0", "above 0.*got '0'"),
        ("energy=nan", "above 0.*got 'nan'"),
    ],
)
def test_limits_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(SphereError, match=sentence) as refused:
        RunConfig(guard=True, guard_limits=text).check()
    assert refused.value.arguments == ("guard_limits",)


def test_limits_without_the_guard_are_refused() -> None:
    with pytest.raises(SphereError, match="ask for it, too"):
        RunConfig(guard_limits="perplexity=2").check()


def test_limits_that_are_given_leave_the_others() -> None:
    limits = parse_limits(" perplexity = 2, energy=inf ,")
    assert limits == {n: limit.default for n, limit in LIMITS.items()} | {
        "perplexity": 2.0,
        "energy": math.inf,
    }
    moved = {"perplexity": math.inf, "control": None, "edits": 0.25, "energy": 1e9, "spectrum": 1.0}
    assert passed(moved, limits) == ["perplexity"]


# ---- what is seen ----


def test_the_watch_against_one_prompt_at_a_time(
    base: TinyRun, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, _ = load_model(str(base.model), "cpu")
    weights = {name: value for name, value in model.named_parameters() if "down_proj" in name}
    watch = ModelWatch(model, tiny_tokenizer, {name: weight.clone() for name, weight in weights.items()})

    def nll(prompt: str, text: str) -> torch.Tensor:
        start, ids = (
            len(tiny_tokenizer(prompt)["input_ids"]),
            tiny_tokenizer(prompt + text)["input_ids"][:256],
        )
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([-logits[i - 1, ids[i]] for i in range(start, len(ids))])

    text = torch.cat([nll(p[0], p[1:]) for p in read_paragraphs(shipped("data") / TEXT_NAME)[:PARAGRAPHS]])
    controls = [nll(p, f" {a}").mean() for p, a in spread(control_prompts(), CONTROLS)]
    found = watch.text_and_controls()
    assert found["text_perplexity"] == pytest.approx(float(text.mean().exp()), rel=1e-4)
    assert found["control_nll"] == pytest.approx(float(torch.stack(controls).mean()), rel=1e-4)
    records = load_records("starter", base.places["data_dir"])
    hold = [
        nll(r.request.text, f" {r.request.target_new}").mean()
        < nll(r.request.text, f" {r.request.target_true}").mean()
        for r in records
    ]
    assert watch.edits_hold(records) == pytest.approx(float(torch.stack(hold).float().mean()))
    name, weight = next(iter(weights.items()))
    changed = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    before, after = hyperspherical_energy(weight), hyperspherical_energy(changed)
    assert watch.weights({name: changed}) == pytest.approx(
        {
            "energy_change": abs(after - before) / before,
            "condition_growth": condition_number(changed) / condition_number(weight),
        }
    )
    logged = {name: {"energy_change": -0.5, "condition": 3 * condition_number(weight)}}
    assert watch.weights({name: changed}, logged) == pytest.approx(
        {"energy_change": 0.5, "condition_growth": 3.0}
    )


def test_a_model_that_says_nothing_is_broken(base: TinyRun, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, _ = load_model(str(base.model), "cpu")
    watch = ModelWatch(model, tiny_tokenizer, {})
    model.model.norm.weight.fill_(math.nan)
    seen = watch.text_and_controls()
    assert seen["text_perplexity"] == seen["control_nll"] == math.inf
    assert watch.weights({}) == {"energy_change": None, "condition_growth": None}


def test_spread_takes_the_first_and_the_last() -> None:
    assert spread(range(5), 8) == [0, 1, 2, 3, 4]
    assert spread(range(101), 5) == [0, 25, 50, 75, 100]


def test_the_report_shows_the_watch(again: RunConfig, watched: Path, tmp_path: Path) -> None:
    page = make_report([folder_of(again), watched], tmp_path / "out", progress=False).read_text()
    assert (tmp_path / "out" / "report" / "figures" / "guard.svg").exists()
    assert "Perplexity of the fixed text" in page or "What the guard saw" in page
    assert f"was stopped before {2 * BATCH} edits: perplexity" in page


def deciding(folder: Path) -> list[dict[str, Any]]:
    """A guard's lines without what a clock said."""
    return [
        {key: value for key, value in line.items() if "seconds" not in key} for line in read_guard(folder)
    ]
