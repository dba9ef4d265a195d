"""The editing loop: batches are written or leave no trace, weights come back, memory stays off the GPU."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPT2_MODULES, LLAMA_MODULES, REQUESTS, tiny_gpt2, tiny_llama
from places import place, pretended_devices
from tiny_run import METHODS, method_values, records
from transformers import PreTrainedTokenizerBase

from sphere import Editor, EditRequest, SphereError, get_method, hparams_from_dict
from sphere.baselines.mend.networks import MendEditor
from sphere.forward.passes import PassOptions
from sphere.methods import Method
from sphere.methods.alphaedit import AlphaEdit
from sphere.methods.sequential_solve import SequentialSolve
from sphere.runs.config import RunConfig, settings
from sphere.runs.resolve import alpha_budget_of, alpha_of, beta_hse_of
from sphere.weights import EditedWeights

CPU = torch.device("cpu")
FACTS = [
    EditRequest(r["case_id"], w["prompt"], w["subject"], w["target_new"]["str"])
    for r in records(20)
    for w in [r["requested_rewrite"]]
]
STATEFUL = ("AlphaEdit", "MEMIT_seq")


def moment(layer: int, size: int = 48) -> torch.Tensor:
    """A second moment that is there without a corpus."""
    generator = torch.Generator().manual_seed(layer)
    keys = torch.randn(size, 4 * size, generator=generator)
    return keys @ keys.T / (4 * size)


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """Editors of tiny models."""

    def editor(
        method: str = "AlphaEdit", model: Any = None, modules: Any = LLAMA_MODULES, **options: Any
    ) -> Editor:
        kind = get_method(method)
        hparams = hparams_from_dict({**method_values(method), **modules}, kind.hparams_class)
        options = {
            "progress": False,
            "context_templates": (("{}",), ("Yes. {}",)),
            "stats_dir": tmp_path,
            **options,
        }
        result = Editor(model or tiny_llama(), tiny_tokenizer, method, hparams, alpha=0.5, **options)
        for layer in hparams.layers if hasattr(hparams, "mom2_dataset") else ():
            size = result.edited.weight(layer).shape[1]
            result.services.second_moments.set(layer, moment(layer, size))
        path = tmp_path / "model" / "mend.safetensors"
        if method == "MEND" and not path.exists():
            torch.manual_seed(0)
            shape = tuple(result.weights.get(result.weights.names[0]).shape)
            MendEditor(dict.fromkeys((1, 2), shape), rank=4, edit_lr=0.1).save(path, {})
        return result

    return editor


def in_batches(editor: Editor, facts: Sequence[EditRequest], size: int = 5) -> dict[str, torch.Tensor]:
    """Edit, and return what would be saved."""
    for i in range(0, len(facts), size):
        editor.edit(facts[i : i + size])
    return editor.final_weights()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


# ---- reverting ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("model", "modules"), [(tiny_llama, LLAMA_MODULES), (tiny_gpt2, GPT2_MODULES)])
def test_twenty_facts_are_reverted_bit_for_bit(dtype: Any, model: Any, modules: Any, make: Any) -> None:
    edited = model().to(dtype)
    original = {name: p.detach().clone() for name, p in edited.named_parameters()}
    editor = make(model=edited, modules=modules)
    first = in_batches(editor, FACTS)
    assert any(not torch.equal(first[name], original[name]) for name in first)
    editor.revert()
    assert editor.n_edits == 0
    assert_same({name: p.detach() for name, p in edited.named_parameters()}, original)
    assert_same(in_batches(editor, FACTS), first)  # nothing of the first time was left


# ---- batches that are not written ----


def breaking(at: int, kind: Any, monkeypatch: pytest.MonkeyPatch, method: type[Method]) -> None:
    """Have the method's update number `at` (counted from 0) go wrong."""
    original = method.updates

    def updates(self: Method, requests: Sequence[EditRequest]) -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, delta) in enumerate(original(self, requests)):
            if index == at and isinstance(kind, BaseException):
                raise kind
            yield name, delta * kind if index == at else delta

    monkeypatch.setattr(method, "updates", updates)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        (float("nan"), SphereError, "is not finite: the batch was not written"),
        (float("inf"), SphereError, "is not finite: the batch was not written"),
        (1e9, SphereError, "the model is breaking"),
        (SphereError("No."), SphereError, "No."),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["nan", "infinity", "huge", "error", "interrupt"],
)
def test_a_broken_batch_leaves_no_trace(
    kind: Any, error: Any, says: str, method: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = FACTS[:6]
    expected = in_batches(make(method), facts, 2)
    editor = make(method)
    in_batches(editor, facts[:2], 2)
    with monkeypatch.context() as patch:
        breaking(1, kind, patch, get_method(method))
        with pytest.raises(error, match=says) as caught:
            editor.edit(facts[2:4])
    if error is SphereError and says != "No.":
        layer = 1 if method == "ROME" else 2
        assert f"model.layers.{layer}.mlp.down_proj.weight in the batch of cases 2 to 3" in str(caught.value)
    assert editor.n_edits == 2
    assert_same(in_batches(editor, facts[2:], 2), expected)


@pytest.mark.parametrize("method", ["AlphaEdit", "FT", "MEMIT_prune", "ROME"])
def test_a_breakdown_may_be_watched(method: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absurdly large update is written with a warning where that is wanted."""
    editor = make(method, on_breakdown="continue")
    name = editor.weights.names[0]
    before = editor.weights.get(name).clone()
    with monkeypatch.context() as patch:
        breaking(0, 1e9, patch, get_method(method))
        report = editor.edit(FACTS[:2])
    assert editor.n_edits == 2
    assert any(f"update of {name}" in text and "model is breaking" in text for text in report.warnings)
    assert (editor.weights.get(name) - before).norm() > 10 * before.norm()
    editor.revert()
    assert torch.equal(editor.weights.get(name), before)


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(kind: float, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make("FT", on_breakdown="continue")
    before = editor.final_weights()
    breaking(0, kind, monkeypatch, get_method("FT"))
    with pytest.raises(SphereError, match="is not finite: the batch was not written"):
        editor.edit(FACTS[:2])
    assert_same(editor.final_weights(), before)


def test_on_breakdown_is_stop_or_continue(make: Any) -> None:
    with pytest.raises(SphereError, match=r"on_breakdown is stop or continue.*got 'ignore'"):
        make("FT", on_breakdown="ignore")


def test_a_weight_that_its_dtype_cannot_hold(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 6e4
    editor = make(model=model.half())
    name = editor.weights.names[0]
    delta = torch.zeros_like(editor.weights.get(name))
    delta[0, 0] = 6e4
    monkeypatch.setattr(AlphaEdit, "updates", lambda *_: iter([(name, delta)]))
    before = editor.final_weights()
    with pytest.raises(SphereError, match=r"layers\.1.*not finite in the model's dtype.*use dtype bfloat16"):
        editor.edit(FACTS[:1])
    assert_same(editor.final_weights(), before)


@pytest.mark.parametrize("method", STATEFUL)
def test_a_solve_that_is_not_finite_names_its_layer(method: str, make: Any) -> None:
    editor = make(method)
    editor.edit(FACTS[:2])
    before = editor.final_weights()
    broken = editor.edited.stack.layers[0].mlp.up_proj.weight
    kept = broken.detach().clone()
    broken.data.fill_(float("nan"))
    with pytest.raises(SphereError, match=r"layer \d.*not finite"):
        editor.edit(FACTS[2:4])
    broken.data.copy_(kept)
    assert_same(editor.final_weights(), before)


def test_a_solve_that_is_not_definite_names_its_layer() -> None:
    solve = SequentialSolve(lambda keys: -10 * keys, 1.0, "layer 7")
    with pytest.raises(SphereError, match="layer 7 is not positive definite: raise L2"):
        solve.solve(torch.eye(3))


def test_nothing_to_edit(make: Any) -> None:
    with pytest.raises(SphereError, match="nothing to edit"):
        make().edit([])


def test_repeated_and_conflicting_requests_are_reported(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    twice = EditRequest(7, REQUESTS[0].prompt, REQUESTS[0].subject, REQUESTS[0].target_new)
    other = EditRequest(8, REQUESTS[0].prompt, REQUESTS[0].subject, "Dutch")
    report = make().edit([REQUESTS[0], twice, other])
    repeats, contradicts, fell_short = report.warnings
    assert repeats.startswith("Case 7 repeats case 0 in one batch: 'The mother tongue of Ann Lee is'")
    assert contradicts.startswith("Case 8 contradicts case 0 in one batch")
    assert "'Dutch' and 'Welsh'" in contradicts
    assert fell_short.startswith("The outputs of the batch of cases 0 to 8")  # both cannot be reached
    assert repeats in caplog.text
    assert contradicts in caplog.text


# ---- saved states ----


@pytest.mark.parametrize("method", METHODS)
def test_a_state_is_taken_up_by_another_editor(method: str, make: Any) -> None:
    expected = in_batches(make(method), FACTS[:6], 2)
    first = make(method)
    in_batches(first, FACTS[:4], 2)
    tensors, append_only, values = first.state()
    second = make(method)
    second.load_state(tensors, {name: t.clone() for name, t in append_only.items()}, values)
    assert second.n_edits == 4
    assert_same(in_batches(second, FACTS[4:6], 2), expected)
    again, kept, _ = second.state()
    assert again.keys() == tensors.keys()
    for name in kept.keys() & append_only.keys():  # some go where state takes a new name
        assert torch.equal(kept[name], append_only[name])


def test_a_state_holds_the_templates_that_the_unedited_model_wrote(make: Any) -> None:
    first, second = (make(context_templates=None) for _ in range(2))
    first.edit(FACTS[:2])
    tensors, append_only, values = first.state()
    second.load_state(tensors, append_only, json.loads(json.dumps(values)))
    assert second.services.context_templates == first.services.context_templates


@pytest.mark.parametrize("method", STATEFUL)
def test_what_lasts_does_not_change_under_its_name(method: str, make: Any) -> None:
    """The contract of `Method.state`, which resume points rely on."""
    editor, seen = make(method), {}
    for i in range(0, 6, 2):
        editor.edit(FACTS[i : i + 2])
        append_only = editor.state()[1]
        assert len(append_only) == 2 * (i // 2 + 1)
        for name, tensor in append_only.items():
            assert tensor.device == CPU
            assert torch.equal(seen.setdefault(name, tensor.clone()), tensor)


def test_a_state_of_another_model_is_refused(make: Any) -> None:
    tensors, append_only, values = make(modules=GPT2_MODULES, model=tiny_gpt2()).state()
    with pytest.raises(SphereError, match="These weights do not fit this model"):
        make().load_state(tensors, append_only, values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_state_of_the_gpu_is_kept(make: Any) -> None:
    editor = make(model=tiny_llama().cuda())
    editor.edit(FACTS[:2])
    state = editor.state()
    first = torch.rand(3, device="cuda")
    editor.load_state(*state)
    assert torch.equal(torch.rand(3, device="cuda"), first)


# ---- memory ----


@pytest.mark.parametrize("conserve_memory", [False, True])
def test_what_conserve_memory_keeps_off_the_gpu(conserve_memory: bool, make: Any) -> None:
    gpu = torch.device("cuda:0")
    where = CPU if conserve_memory else gpu
    with pretended_devices():
        model = place(tiny_llama(), dict.fromkeys(("model", "lm_head"), "cuda:0"))
        editor = make(model=model, passes=PassOptions(conserve_memory=conserve_memory))
        editor.edit(FACTS[:2])
        assert {w.device for w in editor.original.values()} == {where}
        assert {editor.services.second_moment(layer).device for layer in (1, 2)} == {where}
        assert {p.basis.device for p in editor.method.projectors.values()} == {where}
        assert {editor.weights.get(name).device for name in editor.weights.names} == {gpu}


@pytest.mark.parametrize("method", ["MEMIT", "ROME"])
def test_factors_of_second_moments_stay_where_these_are(
    method: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MEMIT's and ROME's systems are solved beside their Cholesky factor; only keys travel."""
    solved: list[torch.device] = []
    original = torch.linalg.solve_triangular

    def solve_triangular(matrix: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if len(matrix) == 48:
            solved.append(matrix.device)
        return original(matrix, *args, **options)

    monkeypatch.setattr(torch.linalg, "solve_triangular", solve_triangular)
    with pretended_devices():
        model = place(tiny_llama(), dict.fromkeys(("model", "lm_head"), "cuda:0"))
        make(method, model=model, passes=PassOptions(conserve_memory=True)).edit(FACTS[:2])
    assert set(solved) == {CPU}


@pytest.mark.parametrize("method", METHODS)
def test_conserve_memory_changes_no_result(method: str, make: Any) -> None:
    plain = in_batches(make(method), FACTS[:4], 2)
    assert_same(in_batches(make(method, passes=PassOptions(conserve_memory=True)), FACTS[:4], 2), plain)


# ---- alpha ----


@pytest.mark.parametrize("method", METHODS)
def test_alpha_is_the_method_s_own_unless_given(method: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """As on the command line: the paper's 0.8, AlphaEdit 0.5."""
    hparams = hparams_from_dict(method_values(method), get_method(method).hparams_class)
    found = Editor(tiny_llama(), tiny_tokenizer, method, hparams)
    assert found.alpha == (0.5 if method in ("AlphaEdit", "BetaEdit", "NAS") else 0.8)
    config = RunConfig(alg_name=method)
    assert found.rules == get_method(method).rules(hparams, beta_hse_of(config), alpha_of(config))
    assert Editor(tiny_llama(), tiny_tokenizer, method, hparams, alpha=0.3).alpha == 0.3


def test_an_editor_s_defaults_are_those_of_a_run() -> None:
    given = inspect.signature(Editor).parameters
    shared = [
        name for name in settings() if name in given and name != "cache_dir"
    ]  # kept with use_cache only
    assert {"beta_hse", "alpha", "seed", "on_breakdown", "stats_dir"} <= set(shared)
    own = {name: settings()[name].default for name in shared}
    own["beta_hse"] = beta_hse_of(RunConfig())  # None: what the hyperparameter file says, else the paper's
    own["alpha_budget"] = alpha_budget_of(RunConfig())
    assert {name: given[name].default for name in shared} == own


# ---- two editors on one model ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_editor_on_weights_that_hold_edits_is_refused(dtype: Any, make: Any) -> None:
    model = tiny_llama().to(dtype)
    first = make(model=model)
    first.edit(FACTS[:2])
    with pytest.raises(
        SphereError, match=r"Another editor \(AlphaEdit\) holds 2 edits.*revert\(\).*close\(\)"
    ):
        make("MEMIT", model=model)
    first.revert()
    second = make("MEMIT", model=model)
    second.edit(FACTS[:2])
    with pytest.raises(SphereError, match="changed since this editor last wrote it"):
        first.edit(FACTS[2:4])
    second.revert()
    first.edit(FACTS[2:4])  # everything is as the first one left it


@pytest.mark.parametrize("how", ["close", "delete"])
def test_an_editor_that_let_go_leaves_its_edits_to_the_next(how: str, make: Any) -> None:
    model = tiny_llama().bfloat16()
    first = make(model=model)
    first.edit(FACTS[:2])
    edited = first.final_weights()
    if how == "close":
        first.close()
    else:
        del first
    second = make(model=model)
    second.edit(FACTS[2:4])
    second.revert()
    assert_same(second.final_weights(), edited)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_of_two_editors_undoes_what_the_other_wrote(dtype: Any, make: Any) -> None:
    model = tiny_llama().to(dtype)
    first, second = make(model=model), make("MEMIT", model=model)
    first.edit(FACTS[:2])
    written = first.final_weights()
    for use in (lambda: second.edit(FACTS[2:4]), second.revert, second.final_weights, second.state):
        with pytest.raises(SphereError, match=r"layers\.1.*layers\.2.*by another editor or by hand"):
            use()
    assert_same(first.final_weights(), written)
    first.edit(FACTS[2:4])
    alone = make(model=tiny_llama().to(dtype))
    assert_same(first.final_weights(), in_batches(alone, FACTS[:4], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", ["in place", "data", "one number", "sign", "replaced"])
def test_weights_changed_by_hand_are_noticed(change: str, dtype: Any, make: Any) -> None:
    model = tiny_llama().to(dtype)
    editor = make(model=model)
    editor.edit(FACTS[:2])
    module = model.model.layers[1].mlp.down_proj
    kept = module.weight.detach().clone()
    with torch.no_grad():
        if change == "in place":
            module.weight += 0.1
        elif change == "data":
            module.weight.data.mul_(1.01)
        elif change == "one number":
            module.weight[3, 5] += 0.1
        elif change == "sign":
            module.weight.neg_()
        else:
            module.weight = torch.nn.Parameter(kept + 0.1, requires_grad=False)
    with pytest.raises(SphereError, match=r"layers\.1\.mlp\.down_proj\.weight changed since"):
        editor.edit(FACTS[2:4])
    if change != "replaced":
        module.weight.data.copy_(kept)
        editor.edit(FACTS[2:4])


def test_weights_that_were_put_back_count_as_untouched(make: Any) -> None:
    """As scoring does: another access to the same weights, which restores them."""
    model = tiny_llama().bfloat16()
    editor = make(model=model)
    editor.edit(FACTS[:2])
    other = EditedWeights(model, editor.weights.names)
    with other.temporarily():
        other.set_(other.names[0], torch.zeros_like(other.get(other.names[0])))
    editor.edit(FACTS[2:4])
    assert_same(editor.final_weights(), in_batches(make(model=tiny_llama().bfloat16()), FACTS[:4], 2))
