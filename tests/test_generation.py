"""Generated text and its metrics, beside slow and plain versions; every so-many-th case of a run; resuming."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from scipy.stats import entropy
from test_reference_texts import SAMPLES, offline, publish, record  # noqa: F401 (a fixture)
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import experiments.evaluate
import scripts.evaluate_each_epoch
from sphere.checkpoints import write_checkpoint, write_config
from sphere.distributed import Processes
from sphere.evaluation import evaluate_run as evaluation
from sphere.evaluation.case_file import CaseFile
from sphere.evaluation.evaluate_run import evaluate_run
from sphere.evaluation.generation import CaseGenerator, WordTokenizer, continue_prompts, ngram_entropy
from sphere.evaluation.scoring import RecordScorer
from sphere.weights import EditedWeights

PROMPTS = ["Rome is", "A", "The largest city of all the world was once"]
SEEDS = [11, 12, 13]


# ---- text ----


def one_at_a_time(model, tokenizer, prompt, seed, max_tokens, top_k=5):
    """The same sampling with neither padding nor cache."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(tokenizer(prompt)["input_ids"])
    for _ in range(max_tokens - len(ids)):
        best, tokens = model(torch.tensor([ids])).logits[0, -1].topk(top_k)
        drawn = torch.rand(1, generator=generator).item()
        cumulative = best.softmax(-1).cumsum(-1).tolist()
        ids.append(int(tokens[next((i for i, c in enumerate(cumulative) if drawn < c), top_k - 1)]))
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Begins each text with its one special token, and pads to the right with it."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", pad_token="<|end|>", padding_side="right"
    )


@pytest.mark.parametrize("bos", [False, True], ids=["no pad token", "BOS, pads right"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_padded_batch_equals_one_text_at_a_time(make, bos, tiny_tokenizer):
    model = make(3)
    tokenizer = with_bos(tiny_tokenizer) if bos else tiny_tokenizer
    assert bos or tokenizer.pad_token_id is None
    found = continue_prompts(model, tokenizer, PROMPTS, SEEDS, max_tokens=48)
    expected = [one_at_a_time(model, tokenizer, p, s, 48) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert found == expected
    assert all(text.startswith(prompt) for text, prompt in zip(found, PROMPTS, strict=True))


def test_a_text_depends_on_its_seed_and_not_on_its_batch(tiny_tokenizer):
    model = tiny_llama(3)
    texts = continue_prompts(model, tiny_tokenizer, PROMPTS, SEEDS, max_tokens=30)
    torch.manual_seed(99)
    alone = [
        continue_prompts(model, tiny_tokenizer, [p], [s], 30)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert alone == texts
    assert continue_prompts(model, tiny_tokenizer, PROMPTS[:1] * 2, [11, 14], 30)[1] != texts[0]


def test_defaults_of_the_model_have_no_say(tiny_tokenizer):
    model = tiny_llama(3)
    texts = continue_prompts(model, tiny_tokenizer, PROMPTS, SEEDS, max_tokens=40)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, top_p=0.1, repetition_penalty=9.0, eos_token_id=list(range(200))
    )
    model.generation_config = own
    assert continue_prompts(model, tiny_tokenizer, PROMPTS, SEEDS, max_tokens=40) == texts
    assert model.generation_config is own


def test_long_prompts_stay_and_broken_models_go_on(tiny_tokenizer):
    model = tiny_llama(3)
    long = "a" * 40
    assert continue_prompts(model, tiny_tokenizer, [long], [0], max_tokens=30) == [long]
    texts = continue_prompts(model, tiny_tokenizer, [long, "b"], [0, 1], max_tokens=30)
    assert texts[0] == long
    assert texts[1] == continue_prompts(model, tiny_tokenizer, ["b"], [1], max_tokens=30)[0]
    model.model.norm.weight.fill_(math.nan)
    assert len(continue_prompts(model, tiny_tokenizer, PROMPTS, SEEDS, max_tokens=20)) == 3
    assert continue_prompts(model, tiny_tokenizer, [], []) == []


def test_a_model_of_few_positions_writes_short_texts(tiny_tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    prompts = [*PROMPTS, "a" * 60]
    found = continue_prompts(model, tiny_tokenizer, prompts, [*SEEDS, 14])
    assert found == [
        one_at_a_time(model, tiny_tokenizer, p, s, 64) for p, s in zip(prompts, [*SEEDS, 14], strict=True)
    ]


# ---- fluency ----


def test_entropy_by_hand():
    # bigrams ab, ba, ab: H = log2(3) - 2/3; trigrams aba, bab: H = 1
    expected = (2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3 * 1) / 2
    assert ngram_entropy("a b a b".split()) == pytest.approx(expected)
    assert ngram_entropy(["a"] * 50) == 0
    assert ngram_entropy(["a"]) == ngram_entropy([]) == 0
    words = "the cat saw the dog and the dog saw the cat and the cat ran".split()
    by_scipy = [
        entropy(list(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values()), base=2)
        for n in (2, 3)
    ]
    assert ngram_entropy(words) == pytest.approx((2 / 3 * by_scipy[0] + 4 / 3 * by_scipy[1]) / 2)


def test_words_and_sentences():
    words = WordTokenizer()
    assert words("He left. She didn't.") == ["He", "left", ".", "She", "did", "n't", "."]
    assert words("Mr. Smith stayed.")[:2] == ["Mr.", "Smith"]
    assert words("") == []


# ---- cases ----


def test_essence_perplexity_beside_the_plain_one(tmp_path, tiny_tokenizer):
    publish(tmp_path, [*SAMPLES, {"name": "person 0", "text": "He likes it there. " * 9}])
    model = tiny_llama(3)
    cases = [record(0), record(1)]
    generator = CaseGenerator(model, tiny_tokenizer, cases, cases, interval=1, data_dir=tmp_path)
    with_essence, without = generator.generate(cases)
    text = SAMPLES[0]["text"] + " " + "He likes it there. " * 9
    ids = torch.tensor([tiny_tokenizer(text)["input_ids"][:100]])
    expected = math.exp(model(ids, labels=ids).loss.item())
    assert with_essence["essence_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert "essence_perplexity" not in without
    assert with_essence["texts"] != without["texts"]


def test_every_so_many_th_case(tiny_tokenizer, tmp_path):
    cases = [record(i) for i in range(10, 0, -1)]  # in the order of editing
    cases[3] = replace(cases[3], generation_prompts=())

    def chosen(interval):
        generator = CaseGenerator(
            tiny_llama(), tiny_tokenizer, cases, cases, interval=interval, data_dir=tmp_path
        )
        return [i for i, case in enumerate(cases) if generator.wants(case)], generator.notes

    found, notes = chosen(3)
    assert found == [0, 6, 9]
    assert "3 of 10 (1 more have no generation prompts" in notes["generation"]
    assert chosen(0) == chosen(-1) == ([], {})


# ---- a run ----

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def setting(tmp_path, tiny_tokenizer, monkeypatch):
    """A run of 9 edits with checkpoints at 5 and 9; texts are made for two cases at a time."""
    model = tiny_llama(3, layers=2)
    folder = tmp_path / "run"
    torch.manual_seed(1)
    for n in (0, 5, 9):
        noise = {
            k: w + 0.02 * n * torch.randn_like(w) for k, w in EditedWeights(model, [NAME]).stored().items()
        }
        write_checkpoint(folder, n, noise)
    write_config(folder, {"case_ids": list(range(9))})
    monkeypatch.setattr(evaluation, "GENERATED_CHUNK", 2)
    monkeypatch.setattr("sphere.evaluation.generation.MAX_TOKENS", 30)
    return model, tiny_tokenizer, folder


def evaluate(setting, interval, records=None, **options):
    records = records or [record(i) for i in range(9)]
    options = {"data_dir": setting[2].parent, **options}
    return evaluate_run(*setting, records, generation_interval=interval, progress=False, **options)


def case_lines(folder, n):
    return [
        json.loads(line)["case"]
        for line in (folder / "summary" / f"cases_edit_{n}.jsonl").open().readlines()[1:]
    ]


def test_generation_of_a_run(setting):
    folder = setting[2]
    summary = evaluate(setting, 2)
    for row in summary["checkpoints"]:
        assert row["metrics"]["fluency"]["n"] == (3 if row["n_edits"] == 5 else 5)
        assert row["metrics"]["consistency"]["n"] == row["metrics"]["fluency"]["n"]
        assert "essence_perplexity" not in row["metrics"]
    assert set(summary["notes"]) == {"model", "generation", "reference_texts", "tfidf_vocabulary"}
    assert "built from the true sentences of 9 records" in summary["notes"]["reference_texts"]
    cases = case_lines(folder, 9)
    assert [c["case_id"] for c in cases] == list(range(9))
    assert [c["case_id"] for c in cases if "generation" in c] == [0, 2, 4, 6, 8]
    assert cases[2]["generation"]["texts"][0].startswith("person 2 likes")
    mean = np.mean([c["generation"]["ngram_entropy"] for c in cases[::2]])
    assert summary["checkpoints"][2]["metrics"]["fluency"]["mean"] == pytest.approx(mean)
    # the unedited model meets the same random numbers
    assert case_lines(folder, 0)[2]["generation"]["seed"] == 0


def test_text_is_added_to_cases_scored_without(setting, monkeypatch):
    folder = setting[2]
    without = evaluate(setting, 0)
    assert "fluency" not in without["checkpoints"][2]["metrics"]
    assert set(without["notes"]) == {"model"}  # there is no run.json to verify it by
    scored, generated = [], []
    score, generate = RecordScorer.score, CaseGenerator.generate
    monkeypatch.setattr(RecordScorer, "score", lambda s, r, p=True: scored.append(r) or score(s, r, p))
    monkeypatch.setattr(CaseGenerator, "generate", lambda s, r: generated.append(len(r)) or generate(s, r))
    every_third = evaluate(setting, 3)
    assert (scored, generated) == ([], [2, 1, 2, 2, 1])
    generated.clear()
    assert evaluate(setting, 3) == every_third
    assert generated == []
    texts = {c["case_id"]: c["generation"]["texts"] for c in case_lines(folder, 9) if "generation" in c}

    assert evaluate(setting, 0)["checkpoints"] == without["checkpoints"]  # text on disk is not counted
    evaluate(setting, 3, seed=1)
    assert sum(generated) == 8
    again = {c["case_id"]: c["generation"]["texts"] for c in case_lines(folder, 9) if "generation" in c}
    assert again.keys() == texts.keys()
    assert all(again[i] != texts[i] for i in texts)

    generated.clear()
    publish(folder.parent, SAMPLES)  # other references: the texts are measured anew
    summary = evaluate(setting, 3, seed=1)
    assert sum(generated) == 8
    assert summary["notes"]["reference_texts"] == "published: attribute_snippets.json"
    assert summary["checkpoints"][2]["metrics"]["essence_perplexity"]["n"] == 1
    assert scored == []


def test_killed_while_generating_gives_the_same_files(setting, monkeypatch):
    folder = setting[2]
    expected = evaluate(setting, 2)
    names = [f"cases_edit_{n}.jsonl" for n in (0, 5, 9)]
    files = {name: (folder / "summary" / name).read_bytes() for name in names}
    append = CaseFile.append
    for killed_at in (3, 6, 10):
        for path in (folder / "summary").iterdir():
            path.unlink()
        calls = []

        def dying(self, records, cases, calls=calls, killed_at=killed_at):
            append(self, records, cases)
            calls.append(1)
            if len(calls) == killed_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(CaseFile, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate(setting, 2)
        monkeypatch.setattr(CaseFile, "append", append)
        assert evaluate(setting, 2) == expected
        assert {name: (folder / "summary" / name).read_bytes() for name in names} == files


def test_records_without_generation_prompts(setting):
    records = [replace(record(i), generation_prompts=()) for i in range(9)]
    summary = evaluate(setting, 2, records)
    assert "fluency" not in summary["checkpoints"][2]["metrics"]
    assert "0 of 9 (5 more have no generation prompts" in summary["notes"]["generation"]


# ---- command lines ----


@pytest.mark.parametrize(
    "flags, interval",
    [
        ([], 0),
        (["--generation_test_interval=5"], 5),
        (["--generation_test_interval=-1"], 0),
        (["--generation_test_interval=5", "--skip_generation_tests"], 0),
    ],
)
def test_flags(flags, interval, monkeypatch, tmp_path):
    found = []

    def evaluate_run(*args, generation_interval, **options):
        found.append((generation_interval, Path(options["data_dir"]), options["seed"], options["dataset"]))
        return {
            "checkpoints": [
                {"label": "edit_2", "n_edits": 2, "metrics": {"kind": "counterfact", "n_cases": 0}}
            ]
        }

    run = SimpleNamespace(
        editor=SimpleNamespace(revert=lambda: None),
        folder=tmp_path,
        model=0,
        tokenizer=0,
        records=[],
        notes={},
        processes=Processes(),
    )
    monkeypatch.setattr("sphere.evaluation.evaluate_run.evaluate_run", evaluate_run)
    monkeypatch.setattr("sphere.evaluation.summary.format_table", lambda summary: "")
    monkeypatch.setattr("sphere.runs.run.execute", lambda *args, **options: run)
    monkeypatch.setattr("sphere.checkpoints.list_checkpoints", lambda folder: [])
    monkeypatch.setattr("sphere.data.records.load_records", lambda *args: ["all records"])
    monkeypatch.setattr("sphere.models.load_model", lambda *args: (0, 0))
    shared = [*flags, f"--data_dir={tmp_path}", "--seed=3"]
    assert experiments.evaluate.main(shared) == 0
    where = [f"--weight_folder={tmp_path}", "--ds_name=starter"]
    assert scripts.evaluate_each_epoch.main([*shared, *where]) == 0
    assert found == [(interval, tmp_path, 3, ["all records"] if interval else None)] * 2
