"""Runs that are killed go on to the very checkpoints of runs that are not; equal seeds give equal bytes."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import killed
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import LABEL, METHODS, TinyRun, contents
from transformers import PreTrainedTokenizerBase

import sphere.checkpoints
from sphere.baselines.mend.networks import MendEditor
from sphere.checkpoints import read_resume, write_resume
from sphere.errors import SphereError
from sphere.fingerprint import tensor_digest
from sphere.methods import sequential_solve
from sphere.runs.resolve import beta_hse_of
from sphere.runs.run import RunConfig, execute

N_RECORDS, KILLS = 16, 10
MOST_STARTS, MOST_STEPS = 200, 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """Settings and files of runs of 8 batches; each test has an output folder of its own."""
    return TinyRun(tmp_path_factory.mktemp("resume"), tiny_tokenizer, N_RECORDS)


def folder_of(config: RunConfig) -> Path:
    """Where a run lies."""
    name = f"starter_weight_data_batch_{config.num_edits}_{beta_hse_of(config):g}_0.5"
    return Path(config.output_dir) / config.alg_name / LABEL / name


def logged(folder: Path) -> list[int]:
    """Numbers of the batches in a run's log."""
    return [json.loads(line)["batch"] for line in (folder / "batches.jsonl").read_text().splitlines()]


def check_same(folder: Path, reference: Path, n_records: int = N_RECORDS) -> None:
    """Same checkpoints and resume point, byte for byte; each batch logged once; nothing half-written."""
    expected = contents(reference)
    assert len(expected) == n_records // 2 + 1
    assert contents(folder) == expected
    assert contents(folder, "resume*") == contents(reference, "resume*")
    assert logged(folder) == list(range(n_records // 2))
    assert [path.name for path in folder.glob(".*")] == [".lock"]


@pytest.mark.slow
def test_killed_at_random_points(tiny: TinyRun) -> None:
    reference = tiny.config("uninterrupted", alpha=0.5)
    start = time.perf_counter()
    killed.finish(reference)
    limit = (time.perf_counter() - start) / 2
    config = tiny.config("killed", alpha=0.5)
    folder, generator, kills, done = folder_of(config), random.Random(0), 0, 0
    for _ in range(MOST_STARTS):
        if kills >= KILLS and done == N_RECORDS:
            break
        begun = (folder / "run.json").exists()
        process = killed.start(killed.continuing(config, begun))
        if killed.kill_after(process, generator.uniform(0.0, limit)):
            kills += 1
            before, done = done, edits_done(folder)
            limit *= 1.0 if done > before else 1.3  # a slow machine must get somewhere, too
        else:
            check_same(folder, folder_of(reference))
            done = N_RECORDS
            if kills < KILLS:  # not killed often enough: once more
                limit /= 2
                shutil.rmtree(folder)
                done = 0
    else:
        pytest.fail(f"{MOST_STARTS} starts: {kills} kills, {done} edits")


def edits_done(folder: Path) -> int:
    """Edits up to a run's resume point."""
    point = read_resume(folder)
    return point[2]["n_edits"] if point else 0


def test_killed_before_every_step_to_the_disk(tiny: TinyRun) -> None:
    """Each restart dies one step later than the one before: no two steps may be left apart."""
    reference = tiny.config("few", dataset_size_limit=6, alpha=0.5)
    killed.finish(reference)
    config = tiny.config("steps", dataset_size_limit=6, alpha=0.5)
    folder, step = folder_of(config), 0
    for step in range(1, MOST_STEPS):
        begun = (folder / "run.json").exists()
        process = killed.start(killed.continuing(config, begun), fatal_step=step)
        if not killed.kill_after(process, killed.SECONDS):
            break
    else:
        pytest.fail(f"not finished after {MOST_STEPS} starts")
    assert step > 15
    check_same(folder, folder_of(reference), 6)


def stop(config: RunConfig, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until a batch (counted from 0) is about to be logged."""
    with killed.stopped(monkeypatch, batch):
        execute(config)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_exactly(method: str, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"alg_name": method, "dataset_size_limit": 6, "alpha": 0.5}
    reference = execute(tiny.config("whole", **settings)).folder
    torch.manual_seed(1)
    stop(tiny.config("broken", **settings), 2, monkeypatch)
    torch.manual_seed(2)
    run = execute(tiny.config("broken", **settings, continue_from_run=True))
    assert [report.n_edits for report in run.reports] == [6]
    check_same(run.folder, reference, 6)
    again = execute(tiny.config("broken", **settings, continue_from_run=True))  # nothing left to do
    assert not again.reports
    check_same(run.folder, reference, 6)


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"use_cache": True}, {"alg_name": "MEMIT_prune"}]
)
def test_other_settings_continue_exactly(
    settings: dict[str, object], tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 16 bits go on from their float32 masters; cached targets change nothing; PRUNE on conditioned ones."""
    if "alg_name" in settings:
        tiny.write_hparams("MEMIT_prune", prune_continue="conditioned")
    name = next(iter(settings))
    config = tiny.config(name, dataset_size_limit=6, alpha=0.5, **settings)
    reference = execute(tiny.config(f"{name}-whole", dataset_size_limit=6, alpha=0.5, **settings)).folder
    stop(config, 1, monkeypatch)
    run = execute(killed.continuing(config, True))
    check_same(run.folder, reference, 6)
    tiny.write_hparams("MEMIT_prune")


def test_a_complete_run_needs_no_resume_point(tiny: TinyRun) -> None:
    run = execute(tiny.config("complete", dataset_size_limit=6, alpha=0.5))
    expected = contents(run.folder)
    for path in run.folder.glob("resume*"):
        path.unlink()
    again = execute(tiny.config("complete", dataset_size_limit=6, alpha=0.5, continue_from_run=True))
    assert not again.reports
    assert again.editor.n_edits == 6
    assert contents(run.folder) == expected
    (run.folder / "edit_6.safetensors").unlink()  # incomplete, from its beginning
    again = execute(tiny.config("complete", dataset_size_limit=6, alpha=0.5, continue_from_run=True))
    assert len(again.reports) == 3
    assert contents(run.folder) == expected


# Keys of the tiny model have 48 numbers: in batches of 25, T becomes a matrix at the second, which takes in the later
# ones at once, or (where B may be as wide as it is) at the fourth.
@pytest.mark.parametrize(
    ("method", "pending", "done"), [("AlphaEdit", sequential_solve.PENDING, 5), ("MEMIT_seq", 1, 4)]
)
def test_a_run_of_more_edits_than_numbers_in_a_key_continues_exactly(
    method: str, pending: int, done: int, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off before, at and after such a moment; its resume point holds the matrices and the keys since."""
    monkeypatch.setattr(sequential_solve, "PENDING", pending)
    world = TinyRun(tmp_path, tiny_tokenizer, 125)
    world.write_hparams(method, v_num_grad_steps=2)
    settings = {"alg_name": method, "num_edits": 25, "dataset_size_limit": 125, "alpha": 0.5}
    reference = execute(world.config("whole", **settings)).folder
    point = read_resume(reference) or pytest.fail("no resume point")
    layers, since = (1, 2), range(done, 5)
    assert point[1].keys() == {
        *(f"{part}.{layer}.{done}" for part in ("t", "c_s_w") for layer in layers),
        *(f"keys.{layer}.{batch}" for layer in layers for batch in since),
    }
    broken = world.config("broken", **settings)
    for batch in (1, 2, 4):
        stop(killed.continuing(broken, batch > 1), batch, monkeypatch)
    torch.manual_seed(2)
    run = execute(killed.continuing(broken, True))
    assert [report.n_edits for report in run.reports] == [125]
    assert contents(run.folder) == contents(reference)
    assert contents(run.folder, "resume*") == contents(reference, "resume*")


# ---- what a run was prepared from ----


def settings_with_moments(tiny: TinyRun, output: str, method: str) -> RunConfig:
    """A short run whose statistics nobody else uses."""
    stats = tiny.folder / f"stats-{output}"
    shutil.copytree(tiny.folder / "stats", stats, dirs_exist_ok=True)
    return tiny.config(output, alg_name=method, dataset_size_limit=6, alpha=0.5, stats_dir=str(stats))


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT", "ROME"])
def test_other_second_moments_are_refused(
    method: str, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings_with_moments(tiny, f"other-moments-{method}", method)
    stop(config, 1, monkeypatch)
    for path in Path(config.stats_dir).rglob("*down_proj.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata, moment = file.metadata(), 1.5 * file.get_tensor("second_moment")
        save_file({"second_moment": moment}, path, metadata={**metadata, "sha256": tensor_digest(moment)})
    before = contents(folder_of(config), "*")
    with pytest.raises(SphereError, match="begun with other second moments than those of today"):
        execute(killed.continuing(config, True))
    assert contents(folder_of(config), "*") == before


def test_a_mend_run_keeps_its_trained_editor(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings_with_moments(tiny, "other-editor", "MEND")
    stop(config, 1, monkeypatch)
    MendEditor(dict.fromkeys((1, 2), (32, 48)), rank=4, edit_lr=0.2).save(
        Path(config.stats_dir) / LABEL / "mend.safetensors", {}
    )
    with pytest.raises(SphereError, match="begun with other trained editor than"):
        execute(killed.continuing(config, True))


def test_a_run_of_an_earlier_version_continues_with_todays_moments(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings_with_moments(tiny, "no-digest", "AlphaEdit")
    stop(config, 1, monkeypatch)
    path = folder_of(config) / "run.json"
    content = json.loads(path.read_text())
    assert len(content.pop("second_moments")) == 64
    path.write_text(json.dumps(content))
    run = execute(killed.continuing(config, True))
    assert [report.n_edits for report in run.reports] == [4, 6]
    assert "does not say which second moments it began with" in caplog.text


def test_same_seed_same_bytes(tiny: TinyRun) -> None:
    first, second = (
        execute(tiny.config(name, dataset_size_limit=6, alpha=0.5, seed=7)).folder for name in ("one", "two")
    )
    assert contents(first) == contents(second)
    assert contents(first, "resume*") == contents(second, "resume*")
    other = execute(tiny.config("three", dataset_size_limit=6, alpha=0.5, seed=8)).folder
    assert contents(other)["edit_6.safetensors"] != contents(first)["edit_6.safetensors"]


def test_resume_point_holds_random_state(tiny: TinyRun) -> None:
    run = execute(tiny.config("random", dataset_size_limit=2, alpha=0.5))
    point = read_resume(run.folder)
    assert point
    torch.manual_seed(99)
    run.editor.load_state(*point)
    assert torch.equal(torch.get_rng_state(), point[0]["rng/cpu"])


# ---- what a resume point writes ----


def test_resume_point_writes_only_what_is_new(tmp_path: Path) -> None:
    keys = {f"keys.{i}": torch.full((2, 3), float(i)) for i in range(4)}
    stamps = {}
    for n in range(1, 5):
        append_only = {name: keys[name] for name in list(keys)[:n]}
        write_resume(tmp_path, {"weight": torch.tensor([float(n)])}, append_only, {"n_edits": n})
        for path in tmp_path.glob("resume_*"):
            assert stamps.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert sorted(stamps) == [f"resume_{n}.safetensors" for n in range(1, 5)]
    tensors, append_only, state = read_resume(tmp_path) or pytest.fail("no resume point")
    assert state == {"n_edits": 4}
    assert tensors["weight"] == 4
    assert append_only.keys() == keys.keys()
    assert all(torch.equal(append_only[name], keys[name]) for name in keys)


def test_resume_point_drops_what_is_no_longer_named(tmp_path: Path) -> None:
    write_resume(tmp_path, {}, {"sum.1": torch.ones(3)}, {"n_edits": 1})
    write_resume(tmp_path, {}, {"sum.2": torch.ones(3)}, {"n_edits": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resume.safetensors", "resume_2.safetensors"]


def test_the_disk_holds_two_resume_points_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is written, and after a kill at the worst moment: before the new one's last file is there."""
    matrix, most, dies = torch.ones(64, 64, dtype=torch.float64), 0, False
    original = sphere.checkpoints.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        nonlocal most
        original(tensors, path, **options)
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
        if dies and "weight" in tensors:
            raise killed.Stopped

    monkeypatch.setattr(sphere.checkpoints, "save_file", save_file)
    for n in range(1, 6):
        point = (
            {"weight": torch.ones(2)},
            {f"t.4.{n}": matrix, f"keys.4.{n}": torch.ones(8)},
            {"n_edits": n},
        )
        dies = True
        with pytest.raises(killed.Stopped):
            write_resume(tmp_path, *point)
        dies = False
        size = write_resume(tmp_path, *point)
        assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 2 * matrix.nbytes < most < 2.2 * matrix.nbytes


def test_what_is_left_of_a_part_is_written_anew(tmp_path: Path) -> None:
    """So that a large tensor never stays on the disk for a small one's sake."""
    kept = torch.arange(3.0)
    write_resume(tmp_path, {}, {"t.4.1": torch.ones(64, 64), "keys.5.1": kept}, {"n_edits": 1})
    size = write_resume(tmp_path, {}, {"keys.5.1": kept}, {"n_edits": 2})
    assert size < 1000
    _, found, _ = read_resume(tmp_path) or pytest.fail("no resume point")
    assert found.keys() == {"keys.5.1"}
    assert torch.equal(found["keys.5.1"], kept)


def test_a_large_part_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sphere.checkpoints, "MOST_PARTS", 3)
    append_only, stamps = {"t.4.1": torch.ones(64, 64)}, set()
    for n in range(1, 9):
        append_only[f"keys.4.{n}"] = torch.ones(2)
        write_resume(tmp_path, {}, append_only, {"n_edits": n})
        stamps.add((tmp_path / "resume_1.safetensors").stat().st_mtime_ns)
    assert len(stamps) == 1


def test_resume_point_keeps_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "resume_backup.safetensors").write_text("mine")
    write_resume(tmp_path, {}, {"sum.1": torch.ones(3)}, {"n_edits": 1})
    write_resume(tmp_path, {}, {"sum.2": torch.ones(3)}, {"n_edits": 2})
    assert (tmp_path / "resume_backup.safetensors").read_text() == "mine"
    assert not (tmp_path / "resume_1.safetensors").exists()


def test_resume_point_has_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sphere.checkpoints, "MOST_PARTS", 4)
    append_only = {}
    for n in range(1, 14):
        append_only[f"keys.{n}"] = torch.full((2,), float(n))
        write_resume(tmp_path, {}, append_only, {"n_edits": n})
        assert len(list(tmp_path.iterdir())) <= 5
    _, found, _ = read_resume(tmp_path) or pytest.fail("no resume point")
    assert all(torch.equal(found[name], tensor) for name, tensor in append_only.items())


@pytest.mark.parametrize("name", ["resume.safetensors", "resume_1.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_resume_point_is_named(name: str, damage: str, tmp_path: Path) -> None:
    write_resume(tmp_path, {}, {"keys": torch.ones(3)}, {"n_edits": 1})
    path = tmp_path / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    if (name, damage) == ("resume.safetensors", "gone"):
        assert read_resume(tmp_path) is None
        return
    with pytest.raises(SphereError, match=f"{name}.*damaged.*overwrite"):
        read_resume(tmp_path)
