"""Packed scoring against one plain forward pass per sequence, for three families of tokenizers and models."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.evaluation.scoring import compare_predictions, count_prompts, score_records
from sphere.forward.packing import Scored
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer
from sphere.requests import EditRequest

CORPUS = [
    "The mother tongue of Danielle Darrieux is French. Édith Piaf spoke the language French, not English.",
    "The capital of Norway is Oslo, the capital of Italy is Rome. What is the capital of New Zealand?",
    "nq question: who sang it first? Dieter Reiter lives in Munich, Bavaria; was it in 1998?",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def trained(tokenizer, vocabulary, special, alphabet=None):
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet or [], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(vocabulary, special, prefix):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, vocabulary, special, sorted(pre_tokenizers.ByteLevel.alphabet()))


def gpt2_like():
    """Byte-level BPE without BOS, learned positions, transposed weights."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(340, ["<|endoftext|>"], False), eos_token="<|endoftext|>"
    )
    config = GPT2Config(
        vocab_size=len(fast), n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    )
    return GPT2LMHeadModel(config), fast


def llama_like():
    """SentencePiece pieces with a leading-space mark, a BOS token before each text, grouped queries."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trained(tokenizer, 200, ["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), num_key_value_heads=2, **SIZES)), fast


def qwen_like():
    """Byte-level BPE without BOS, a padding token, attention biases, tied embeddings."""
    special = ["<|endoftext|>", "<|im_start|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(330, special, False), eos_token=special[0], pad_token=special[0]
    )
    config = Qwen2Config(vocab_size=len(fast), num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
    return Qwen2ForCausalLM(config), fast


def bloom_like():
    """ALiBi: positions come from a mask that no tree fits into."""
    fast = qwen_like()[1]
    return BloomForCausalLM(
        BloomConfig(vocab_size=len(fast), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    ), fast


FAMILIES = {f.__name__: f for f in (gpt2_like, llama_like, qwen_like, bloom_like)}


@pytest.fixture(params=[(name, side) for name in FAMILIES for side in ("left", "right")], ids="-".join)
def pair(request):
    name, side = request.param
    torch.manual_seed(3)
    model, tokenizer = FAMILIES[name]()
    tokenizer.padding_side = side
    return model.eval(), tokenizer


def counterfact_records():
    data = [
        ("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
        ("The mother tongue of {} is", "Édith Piaf", "Norwegian Bokmål", "French"),
        ("The capital of {} is", "New Zealand", "Rome, Italy", "Rome"),  # one target begins the other
        ("{}, the", "Oslo", "capital", "captain of industry"),
    ]
    return [
        Record(
            i,
            EditRequest(i, prompt, subject, new, true),
            paraphrase_prompts=(f"What is it? Of {subject} one says", prompt.replace("{}", subject)),
            neighborhood=(("The capital of Norway is", None), (f"Dieter Reiter, the {i}", None)),
        )
        for i, (prompt, subject, new, true) in enumerate(data)
    ]


def zsre_records():
    return [
        Record(
            i,
            EditRequest(i, "What is the capital of {}?", subject, "in New Zealand 1998"),
            "zsre",
            paraphrase_prompts=(f"{subject} has which capital?",),
            neighborhood=(("nq question: who sang it first?", "Danielle Darrieux"),),
        )
        for i, subject in enumerate(["Norway", "Bavaria"])
    ]


@torch.no_grad()
def plain(model, tokenizer, prompt, target):
    """NLLs and argmaxes of the target's tokens, from one sequence alone and the token count of its prompt."""
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    tokens = torch.tensor(ids[start:])
    nll = -logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    return nll.mean().item(), (logits.argmax(-1) == tokens).tolist(), logits.argmax(-1).tolist()


def test_counterfact_equals_one_sequence_at_a_time(pair):
    model, tokenizer = pair
    records = counterfact_records()
    cases = score_records(model, tokenizer, records, progress=False, passes=PassOptions(batch_tokens=90))
    assert [case["case_id"] for case in cases] == [0, 1, 2, 3]
    assert count_prompts(cases) == 4 * 5
    for record, case in zip(records, cases, strict=True):
        prompts = {
            "rewrite": [record.request.text],
            "paraphrase": record.paraphrase_prompts,
            "neighborhood": [prompt for prompt, _ in record.neighborhood],
        }
        for section, texts in prompts.items():
            assert [entry["prompt"] for entry in case[section]] == list(texts)
            for entry in case[section]:
                new, new_hits, _ = plain(model, tokenizer, entry["prompt"], record.request.target_new)
                true, true_hits, _ = plain(model, tokenizer, entry["prompt"], record.request.target_true)
                assert entry["nll_new"] == pytest.approx(new, abs=1e-4)
                assert entry["nll_true"] == pytest.approx(true, abs=1e-4)
                sign = -1 if section == "neighborhood" else 1
                assert entry["success"] == (sign * (true - new) > 0)
                assert entry["accuracy"] == all(true_hits if sign < 0 else new_hits)
                difference = sign * (math.exp(-new) - math.exp(-true))
                assert entry["prob_diff"] == pytest.approx(difference, abs=1e-5)


def test_zsre_equals_one_sequence_at_a_time(pair):
    model, tokenizer = pair
    records = zsre_records()
    cases = score_records(model, tokenizer, records, progress=False)
    for record, case in zip(records, cases, strict=True):
        for entry in (*case["rewrite"], *case["paraphrase"]):
            _, hits, predicted = plain(model, tokenizer, entry["prompt"], record.request.target_new)
            assert entry["accuracy"] == sum(hits) / len(hits)
            assert entry["predicted"] == predicted
        (entry,) = case["neighborhood"]
        _, hits, predicted = plain(model, tokenizer, entry["prompt"], "Danielle Darrieux")
        assert entry["accuracy_given_answer"] == sum(hits) / len(hits)
        assert entry["accuracy_unedited_prediction"] is None
        assert entry["predicted"] == predicted
        assert len(predicted) > 1


def test_reference_is_the_unedited_prediction():
    torch.manual_seed(0)
    model, tokenizer = qwen_like()
    records = zsre_records()
    reference = score_records(model, tokenizer, records, progress=False)
    before = [case["neighborhood"][0]["predicted"] for case in reference]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(
            torch.randn_like(model.model.layers[1].mlp.down_proj.weight)
        )
    for case, predicted in zip(
        score_records(model, tokenizer, records, progress=False, reference=reference), before, strict=True
    ):
        (entry,) = case["neighborhood"]
        same = [a == b for a, b in zip(entry["predicted"], predicted, strict=True)]
        assert entry["accuracy_unedited_prediction"] == sum(same) / len(same)
    with pytest.raises(SphereError, match="no scores of the unedited model"):
        compare_predictions(reference, reference[:1])


def test_logits_are_the_models_own(pair):
    """A model that does more to its logits than its output embedding (scaling, capping) is scored as it is."""
    model, _ = pair
    sequences = [Scored((5, 6, 7, 8), 1), Scored((5, 6, 9), 2)]
    before = PackedScorer(model).score(sequences)

    class Capped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = 0.5 * torch.tanh(output.logits / 0.5)
            return output

    after = PackedScorer(Capped(model)).score(sequences)
    with torch.no_grad():
        logits = 0.5 * torch.tanh(model(torch.tensor([[5, 6, 9]])).logits / 0.5)
    assert after[sequences[1]].nll[0] == pytest.approx(-logits.log_softmax(-1)[0, 1, 9].item(), abs=1e-5)
    assert abs(after[sequences[1]].nll[0] - before[sequences[1]].nll[0]) > 1e-3


def test_destroyed_model_succeeds_nowhere():
    torch.manual_seed(0)
    model, tokenizer = llama_like()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    for case in score_records(model, tokenizer, counterfact_records(), progress=False):
        for entry in (*case["rewrite"], *case["paraphrase"], *case["neighborhood"]):
            assert not entry["success"]
            assert not entry["accuracy"]
            assert entry["nll_new"] is None


def test_bad_input():
    model, tokenizer = llama_like()
    with pytest.raises(SphereError, match="Case 3 has no true target"):
        score_records(model, tokenizer, [Record(3, EditRequest(3, "{} is", "x", "y"))], progress=False)
    long = Record(3, EditRequest(3, "{} is", "x " * 200, "y", "z"))
    with pytest.raises(SphereError, match="only 128 positions"):
        score_records(model, tokenizer, [long], progress=False)
    assert score_records(model, tokenizer, [], progress=False) == []
