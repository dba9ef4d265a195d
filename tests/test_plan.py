"""The memory plan: what it counts on the meta device is what really is there, and 7B models fit where they should."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_MODULES, REQUESTS, tiny_hparams, tiny_llama
from test_architectures import ARCHITECTURES, METHODS, tiny_model
from test_architectures import tiny_hparams as shipped_hparams
from tiny_run import TinyRun, command

from experiments.evaluate import main
from sphere.commands import plan as plan_command
from sphere.editor import Editor
from sphere.errors import SphereError
from sphere.forward.layers import LayerStack
from sphere.forward.modules import inference
from sphere.methods.sequential_solve import SequentialSolve, save_solves
from sphere.models import load_model, meta_model
from sphere.runs.config import RunConfig
from sphere.runs.memory import DEVICE, DISK, HOST, PHASES, Sizes, earlier_keys
from sphere.runs.operation_counter import PROBE_ROWS, PROBE_WIDTH, Counted, count
from sphere.runs.plan import Plan, format_plan, plan_run
from sphere.runs.rates import measure_rates

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder that holds config.json and no weights."""
    folder = tmp_path_factory.mktemp("qwen") / "Qwen2.5-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return folder


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """The pass on the meta device takes seconds; of one model it is the same for every plan."""
    known: dict[tuple[object, ...], Counted] = {}

    def cached(stack: LayerStack, first: int, last: int) -> Counted:
        key = (str(stack.model.config), str(stack.model.dtype), first, last)
        if key not in known:
            known[key] = count(stack, first, last)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sphere.runs.plan.count", cached)
        yield


def plan_7b(folder: Path, **settings: object) -> Plan:
    defaults = {"device": "cuda", "num_edits": 100, "dataset_size_limit": 5000}
    return plan_run(RunConfig(model_name=str(folder), **defaults | settings))


def size_of(plan: Plan, what: str) -> int:
    (item,) = [item for item in plan.items if what in item.what]
    return item.size


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT_seq"])
def test_a_7b_model_fits_80_gb_with_room_and_24_gb_with_conserve_memory(qwen, method):
    gib = 2**30
    roomy = plan_7b(qwen, alg_name=method)
    assert size_of(roomy, "model weights") == pytest.approx(7.6e9 * 2, rel=0.01)
    assert 25 * gib < roomy.peak(DEVICE)[1] < 50 * gib
    tight = plan_7b(qwen, alg_name=method, conserve_memory=True, batch_tokens=512)
    assert tight.peak(DEVICE)[1] < 21 * gib  # of about 23.5 that a card of 24 leaves
    assert tight.peak(HOST)[1] < 40 * gib
    assert tight.peak(HOST)[1] > roomy.peak(HOST)[1]
    assert tight.peak(DISK) == roomy.peak(DISK)


def test_the_plan_is_of_all_facts_that_are_edited(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    world = TinyRun(tmp_path, tiny_tokenizer, n_records=8)
    table = tmp_path / "facts.csv"
    table.write_text("prompt,subject,target_new\n" + "".join(f"{{}} is in,Ann{i},Rome\n" for i in range(5)))
    words = [*world.flags(device="cuda"), f"--facts={table}"]
    assert main([*words, "--dry_run"]) == 0
    assert "5 edits in batches of 2" in capsys.readouterr().out

    def title(**settings: object) -> str:
        return plan_run(world.config(device="cuda", **settings)).title[1]

    assert "5 edits in batches of 2" in title(facts=str(table), dataset_size_limit=9)
    assert "8 edits in batches of 2" in title(dataset_size_limit=None)
    assert "9000 edits in batches of 2" in title(ds_name="mquake_cf", dataset_size_limit=9000)  # not here
    for bad, said in (
        (table, "1 of 1 rows of .* cannot be used"),
        (tmp_path / "none.csv", "No table of facts"),
    ):
        table.write_text("prompt,subject,target_new\n{} is in,,Rome\n")
        code, _, err = command(plan_command.main, [*words, f"--facts={bad}"], monkeypatch, capsys)
        assert code == 2
        assert re.search(said, err)


def test_the_disk_holds_the_ledger(qwen):
    per_edit, whole = 4 * 5 * (3584 + 18944), 4 * 5 * 3584 * 18944
    assert size_of(plan_7b(qwen), "ledger") == 5000 * per_edit
    assert not [item for item in plan_7b(qwen, alg_name="MEMIT_rect").items if "ledger" in item.what]
    assert size_of(plan_7b(qwen, alg_name="MEMIT_rect", ledger="all"), "ledger") == 50 * whole
    assert not [item for item in plan_7b(qwen, ledger="none").items if "ledger" in item.what]


def test_the_plan_grows_with_what_it_should(qwen):
    base = plan_7b(qwen)
    most = 18944 + 18944 // 8 + 100  # a matrix, an eighth of it, and a batch
    for n_edits, columns in ((5000, 5000), (10000, 10000), (50000, most), (100000, most)):
        assert size_of(plan_7b(qwen, dataset_size_limit=n_edits), "key cache") == 5 * 8 * 18944 * columns
    stack = LayerStack(
        meta_model(str(qwen), "bfloat16"), tiny_hparams(LLAMA_MODULES, layers=[4, 8], v_loss_layer=27)
    )
    saved = 1024 * count(stack, 9, 27).saved
    assert size_of(plan_7b(qwen, batch_tokens=1024), "saved for the gradient") == pytest.approx(
        saved, rel=1e-6
    )
    assert size_of(plan_7b(qwen, dtype="float32"), "model weights") == pytest.approx(7.6e9 * 4, rel=0.01)
    assert not [i for i in plan_7b(qwen, dtype="float32").items if "masters of" in i.what]
    flops = {stage: operations for stage, _, operations in base.flops}
    more = {stage: operations for stage, _, operations in plan_7b(qwen, num_edits=200).flops}
    assert more["target values"] == pytest.approx(2 * flops["target values"])
    assert more["principal directions: products"] == flops["principal directions: products"]
    assert not [s for s, _, _ in plan_7b(qwen, beta_hse=0.0).flops if "principal" in s]


def test_operations_of_a_pass_are_two_per_weight(qwen):
    """Beside attention's and the head's, which are small here, as is what the top layer's MLP is spared."""
    model = meta_model(str(qwen))
    stack = LayerStack(model, tiny_hparams(LLAMA_MODULES, layers=[4, 8], v_loss_layer=27))
    counted = count(stack, 9, 27)
    weights = sum(p.numel() for layer in stack.layers[9:27] for p in layer.parameters() if p.ndim == 2)
    assert counted.forward == pytest.approx(2 * weights, rel=0.05)
    assert counted.backward == pytest.approx(counted.forward, rel=0.05)
    assert counted.kv == 28 * 2 * 512 * 4
    assert counted.head == 2 * 3584 * 152064
    assert counted.below == pytest.approx(2 * weights / 18 * 9, rel=0.05)


def test_what_is_counted_on_the_meta_device_is_what_is_saved():
    model = tiny_llama()
    hparams = tiny_hparams(LLAMA_MODULES)
    meta = copy.deepcopy(model).to("meta")
    counted = count(LayerStack(meta, hparams), 3, 3)
    stack = LayerStack(model, hparams)
    ids = torch.zeros(PROBE_ROWS, PROBE_WIDTH, dtype=torch.long)
    mask = torch.zeros(PROBE_ROWS, 1, PROBE_WIDTH, PROBE_WIDTH)
    recording = stack.record({"input_ids": ids, "attention_mask": mask, "use_cache": False}, 3, 3)
    row = torch.arange(PROBE_ROWS)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with inference(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = recording.hidden.clone().requires_grad_(True)
        stack.run_at(recording, hidden, 3, 3, row, torch.zeros_like(row))
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    assert counted.saved * PROBE_ROWS * PROBE_WIDTH == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT_seq"])
def test_what_solves_keep_is_what_the_plan_says(method, tmp_path, tiny_tokenizer):
    world = TinyRun(tmp_path, tiny_tokenizer)
    config = world.config(alg_name=method, dataset_size_limit=3)
    plan = plan_run(config)
    model, tokenizer = load_model(config.model_name, "cpu")
    kind = "AlphaEdit" if method == "AlphaEdit" else "MEMIT"
    from sphere.hparams import load_hparams
    from sphere.methods import get_method

    hparams = load_hparams(tmp_path / "hparams" / method / "tiny.json", get_method(method).hparams_class)
    editor = Editor(model, tokenizer, method, hparams, stats_dir=tmp_path / "stats", progress=False)
    editor.edit(REQUESTS)
    solves = editor.method.solves.values()
    cache = sum(solve.nbytes for solve in solves)
    blocks = sum(block.nbytes for solve in solves for block in solve.key_blocks)
    assert size_of(plan, "key cache") == cache
    assert size_of(plan, "earlier keys, as they are saved") == blocks
    if kind == "AlphaEdit":
        kept = sum(projector.basis.nbytes for projector in editor.method.projectors.values())
        assert kept <= size_of(plan, "projectors")
    moments = sum(editor.services.second_moment(layer).nbytes for layer in hparams.layers)
    assert size_of(plan, "second moments of keys") == moments
    assert size_of(plan, "as they were at first") == sum(w.nbytes for w in editor.original.values())
    state = sum(t.nbytes for name, t in editor.state()[0].items() if name != "rng")
    assert size_of(plan, "resume point") >= state


@pytest.mark.parametrize(("n", "batches"), [(2, 3), (2, 60), (5, 30)])
def test_what_solves_keep_of_many_edits_is_what_the_plan_says(n, batches, tmp_path):
    """Never more, and once about as much: before T becomes a matrix and long after."""
    size = 24
    solve = SequentialSolve(lambda keys: keys, 1.0, "layer 0")
    sizes = Sizes(((8, size),), 4, 4, n * batches, n)
    cache, keys, disk = (item.size for item in earlier_keys(sizes)[:3])
    most_cache, most_keys, most_disk, before = 0, 0, 0, 0
    for batch in range(batches):
        solve.append(torch.randn(size, n, generator=torch.Generator().manual_seed(batch)))
        most_cache = max(most_cache, solve.nbytes)
        most_keys = max(most_keys, sum(block.nbytes for block in solve.key_blocks))
        saved = sum(tensor.nbytes for tensor in save_solves({0: solve}).values())
        replaced = before if solve.compacted and not solve.key_blocks else 0  # the old point goes last
        most_disk, before = max(most_disk, saved + replaced), saved
    for found, bound in ((most_cache, cache), (most_keys, keys), (most_disk, disk)):
        assert 0.8 * bound <= found <= bound


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_method_on_every_architecture_has_a_plan(architecture, tmp_path):
    config, shipped = ARCHITECTURES[architecture]
    config.save_pretrained(tmp_path / "model")
    model = tiny_model(config)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for method in METHODS:
        path = tmp_path / "hparams" / method / "model.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(shipped_hparams(method, shipped).to_dict()))
        run = RunConfig(
            alg_name=method,
            model_name=str(tmp_path / "model"),
            hparams_dir=str(tmp_path / "hparams"),
            device="cuda",
            dtype="float32",
        )
        plan = plan_run(run)
        assert size_of(plan, "model weights") == weights
        assert "(16 x 32)" in format_plan(plan)
        assert "no times" in format_plan(plan)
        if method not in ("AlphaEdit", "MEMIT_seq"):
            continue
        spared = plan_run(dataclasses.replace(run, conserve_memory=True))
        assert all(spared.totals(DEVICE)[p] <= plan.totals(DEVICE)[p] for p in PHASES[1:])
        merged = plan_run(dataclasses.replace(run, device="cpu"))
        assert merged.totals(HOST)["writing"] > weights  # of one memory
        assert "device:" not in format_plan(merged)


def test_rates_and_times():
    rates = measure_rates("cpu", torch.float32)
    assert set(rates) == {"model", "float32", "float64", "eigh"}
    assert all(rate > 0 for rate in rates.values())


def test_dry_run_prints_the_plan_and_does_nothing_else(qwen, capsys, tmp_path, monkeypatch):
    words = [f"--model_name={qwen}", "--hparams_fname=Qwen2.5-7B.json"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--dry_run", "--device=cuda", "--conserve_memory"]) == 0
    out = capsys.readouterr().out
    assert "7.62 billion parameters in bfloat16, 28 layers, 5 edited (3584 x 18944)" in out
    assert "GiB at most" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "./nowhere", "hparams_fname": "Qwen2.5-7B.json"}, "No model at"),
        ({"device": "toaster"}, "Device 'toaster' is not available"),
        ({"device": "mps"}, "it has no float64"),
        ({"hparams_fname": "gpt2-xl.json"}, "no module"),
        ({"num_edits": 0}, "num_edits"),
        ({"beta_hse": 2.0}, "beta_hse"),
    ],
)
def test_what_no_run_can_be_made_of(settings, message, qwen):
    with pytest.raises(SphereError, match=message):
        plan_run(RunConfig(**{"model_name": str(qwen), **settings}))


def test_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(SphereError, match="Cannot read the configuration"):
        meta_model(str(tmp_path))
