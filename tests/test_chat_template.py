"""Prompts in the user's turn of a chat template: positions, edits, scores, runs that are continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REQUESTS, tiny_llama, tiny_olmo2
from tiny_run import TinyRun, contents
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sphere import Editor, EditRequest, SphereError
from sphere.checkpoints import read_config
from sphere.data.records import Record, load_records
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.generation import continue_prompts
from sphere.evaluation.scoring import score_records
from sphere.evaluation.unedited_answers import complete
from sphere.models import load_model
from sphere.runs.config import command_of
from sphere.runs.resolve import folder_of
from sphere.runs.run import execute
from sphere.values.chat_template import in_turn, user_turn
from sphere.values.compute_ks import ids_to_subject
from sphere.values.context_templates import fill
from sphere.values.tokenization import bos_text, encode, encode_pair
from sphere.values.z_batches import prompts_of

CHATML = (
    "{% for m in messages %}{{ bos_token or '' }}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURN = "<|user|>\n{}<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a chat template, which begins with BOS, as its post-processor's texts do."""
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    special = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", chat_template=CHATML
    )


def test_the_turn_is_the_tokenizers_own(tokenizer, tiny_tokenizer) -> None:
    assert user_turn(tokenizer, True) == f"<s>{TURN}"
    assert user_turn(tokenizer, False) == "{}"
    assert user_turn(tokenizer, "Q: {} A:") == "Q: {} A:"
    with pytest.raises(SphereError, match="the prompt's place once"):
        user_turn(tokenizer, "no place")
    with pytest.raises(SphereError, match="tokenizer has no chat template"):
        user_turn(tiny_tokenizer, True)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{}", "{{ 1 / }}"]
)
def test_templates_that_do_not_give_the_words_back_are_refused(tokenizer, template: str) -> None:
    changed = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    with pytest.raises(SphereError, match="chat template"):
        user_turn(changed, True)


@pytest.mark.parametrize("subject", ["Ann Lee", "中国", "Zoë", "Bo "])
@pytest.mark.parametrize("template", ["{}", "It rained. {}"])
def test_lookups_and_targets_lie_in_the_turn(tokenizer, subject: str, template: str) -> None:
    turn = user_turn(tokenizer, True)
    request = EditRequest(0, "The home of {}is", subject, "Rome")
    ids = ids_to_subject(tokenizer, in_turn(turn, template), request)
    assert ids.count(tokenizer.bos_token_id) == 1
    context = template.replace("{}", "The home of ")
    assert tokenizer.decode(ids) == f"<s><|user|>\n{context}{subject.rstrip()}"
    own, kl = prompts_of(
        tokenizer, 0, request, [in_turn(turn, template)], kl=True, merge=True, bare=in_turn(turn, "{}")
    )
    assert tuple(own.ids[: own.lookup + 1]) == ids
    assert own.bare == (template == "{}")
    asked = turn.replace("{}", f"{context}{subject}is")
    assert tokenizer.decode(own.ids) == f"{asked}Rom"  # no blank behind the newline
    assert len(own.scored) == len("Rome")
    assert tokenizer.decode(kl.ids) == f"<s><|user|>\n{subject.rstrip()}"


def test_a_prompt_with_its_own_bos_keeps_one(tokenizer) -> None:
    request = EditRequest(0, "<s>{} is", "Ann", "Rome")
    filled = fill(user_turn(tokenizer, True), request, bos_text(tokenizer))
    assert encode(tokenizer, filled.text).ids.count(tokenizer.bos_token_id) == 1


def test_what_a_tokenizer_puts_before_every_text_stands_once(tiny_tokenizer) -> None:
    """As GLM-4's, whose chat template begins with it, too, and which has no BOS."""
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    before = ["[gMASK]", "<sop>"]
    backend.add_special_tokens(before)
    special = [(token, backend.token_to_id(token)) for token in before]
    backend.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=before, chat_template="[gMASK]<sop>" + CHATML
    )
    for text in (in_turn(user_turn(tokenizer, True), "Ann is"), "Ann is"):
        ids = encode(tokenizer, text).ids
        assert tokenizer.decode(ids) == "[gMASK]<sop>" + text.removeprefix("[gMASK]<sop>")


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("AlphaEdit", tiny_llama),
        ("MEMIT", tiny_olmo2),
        ("NAS", tiny_llama),
        ("ROME", tiny_llama),
        ("FT", tiny_llama),
    ],
)
def test_an_edit_is_that_of_prompts_written_out(tokenizer, method: str, model) -> None:
    """A chat template does what prompts with its text around them, and context templates with it inside, would."""
    from tiny_run import method_values

    from sphere import hparams_from_dict
    from sphere.methods import get_method

    request = EditRequest(0, "The home of {} is", "Ann", "Rome")
    kind = get_method(method).hparams_class
    values = method_values(method)  # the prompt of the KL term would be put into the turn, too
    hparams = hparams_from_dict(values | ({"kl_factor": 0.0} if "kl_factor" in values else {}), kind)

    def edited(request: EditRequest, chat: bool | str, templates) -> tuple[dict[str, torch.Tensor], object]:
        editor = Editor(
            model(),
            tokenizer,
            method,
            hparams,
            context_templates=templates,
            chat_template=chat,
            progress=False,
        )
        report = editor.edit([request])
        return editor.final_weights(), report.layers

    in_chat, said = edited(request, True, (("{}",),))
    written = edited(replace(request, prompt=in_turn(TURN, request.prompt)), False, (("{}",),))
    assert said == written[1]  # what was reached of z, too
    for name, weight in in_chat.items():
        assert weight.equal(written[0][name])
    assert all(w.equal(in_chat[n]) for n, w in edited(request, TURN, (("{}",),))[0].items())
    assert not all(w.equal(in_chat[n]) for n, w in edited(request, False, (("{}",),))[0].items())


def test_scores_are_of_the_answer_behind_the_turn(tokenizer) -> None:
    model, turn = tiny_llama(), user_turn(tokenizer, True)
    record = Record(0, REQUESTS[0], paraphrase_prompts=("He is",), neighborhood=(("She is", None),))
    case = score_records(model, tokenizer, [record], user_turn=turn, progress=False)[0]
    for section, prompt in (
        ("rewrite", record.request.text),
        ("paraphrase", "He is"),
        ("neighborhood", "She is"),
    ):
        (entry,) = case[section]
        assert entry["prompt"] == prompt
        ids, start = encode_pair(tokenizer, turn.replace("{}", prompt), "Welsh")
        assert tokenizer.decode(ids[start:]) == "Welsh"
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nll = -sum(float(log_p[p - 1, ids[p]]) for p in range(start, len(ids))) / (len(ids) - start)
        assert entry["nll_new"] == pytest.approx(nll, abs=1e-4)


def test_generated_text_is_the_prompt_and_the_answer(tokenizer) -> None:
    model, turn = tiny_llama(), user_turn(tokenizer, True)
    texts = continue_prompts(model, tokenizer, ["Ann is", "Bo plays the"], [1, 2], 30, user_turn=turn)
    for prompt, text in zip(["Ann is", "Bo plays the"], texts, strict=True):
        assert text.startswith(prompt)
        assert "user" not in text
    (alone,) = continue_prompts(model, tokenizer, ["Ann is"], [1], 30, user_turn=turn)
    assert alone == texts[0]


def test_the_unedited_model_is_asked_in_the_turn(tokenizer) -> None:
    model, turn = tiny_llama(), user_turn(tokenizer, True)
    request = replace(REQUESTS[0], target_true=None, target_new="国")
    written = replace(request, prompt=in_turn(turn, request.prompt))
    asked, plain, wanted = (
        complete(model, tokenizer, [Record(0, r, neighborhood=(("She is", "so"),))], [], user_turn=own)[0][0]
        for r, own in ((request, turn), (request, "{}"), (written, "{}"))
    )
    assert asked.request.target_true == wanted.request.target_true != plain.request.target_true


# ---- runs ----


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("chat"), tokenizer, n_records=4)


def test_a_run_keeps_its_turn_and_is_scored_in_it(world: TinyRun, tmp_path: Path) -> None:
    tiny = world.copy(tmp_path)
    config = tiny.config("whole", alg_name="FT", chat_template=True)
    run = execute(config)
    assert run.folder == folder_of(config) != folder_of(replace(config, chat_template=False))
    written = read_config(run.folder)
    assert written["user_turn"] == f"<s>{TURN}"
    assert "--chat_template" in command_of(written).split()
    model, tokenizer = load_model(tiny.model, "cpu")
    records = load_records("starter", tiny.folder / "data")
    evaluate_run(model, tokenizer, run.folder, records, progress=False)
    lines = (run.folder / "summary" / "cases_edit_4.jsonl").read_text().splitlines()
    header, case = json.loads(lines[0]), json.loads(lines[1])["case"]
    assert header["user_turn"] == written["user_turn"]
    assert run.editor.final_weights().keys()
    own = score_records(run.model, run.tokenizer, records, user_turn=written["user_turn"], progress=False)
    assert case["rewrite"][0]["nll_new"] == pytest.approx(own[0]["rewrite"][0]["nll_new"], abs=1e-4)


def test_a_run_is_continued_in_the_turn_that_it_began_with(world: TinyRun, tmp_path: Path) -> None:
    """Templates may hold the day: another one tomorrow must not change a run."""
    tiny = world.copy(tmp_path)
    whole = execute(tiny.config("whole", alg_name="FT", chat_template=True))
    half = tiny.config("half", alg_name="FT", chat_template=True, dataset_size_limit=4)
    folder = execute(half).folder
    for name in ("edit_4.safetensors", "resume.safetensors"):
        (folder / name).unlink()
    _, tokenizer = load_model(tiny.model, "cpu")
    tokenizer.chat_template = CHATML.replace("<|assistant|>", "<|tomorrow|>")
    tokenizer.save_pretrained(tiny.model)
    execute(replace(half, continue_from_run=True))
    assert read_config(folder)["user_turn"] == f"<s>{TURN}"
    assert contents(folder)["edit_4.safetensors"] == contents(whole.folder)["edit_4.safetensors"]


def test_without_a_chat_template_a_run_is_one_sentence(tmp_path: Path, tiny_tokenizer) -> None:
    tiny = TinyRun(tmp_path, tiny_tokenizer, n_records=2)
    with pytest.raises(SphereError, match="tokenizer has no chat template") as caught:
        execute(tiny.config(alg_name="FT", chat_template=True))
    assert caught.value.arguments == ("chat_template",)
