"""The starter dataset as shipped, and the builder on a tiny table with a tiny random model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.build_starter import main
from sphere.data.starter import StarterConfig, TargetScorer, build_starter, fill, load_facts
from sphere.errors import SphereError
from sphere.forward.passes import PassOptions
from sphere.values.tokenization import encode_pair

ROOT = Path(__file__).parents[1]
STARTER, FACTS = ROOT / "data" / "starter.json", ROOT / "data" / "starter_facts.json"
SUBJECTS = [f"subject{i}" for i in range(24)]
OBJECTS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def records():
    return json.loads(STARTER.read_text("utf-8"))


@pytest.fixture(scope="module")
def facts():
    return {relation.name: relation for relation in load_facts(FACTS)}


def relation(**changes):
    entry = {
        "relation_id": "P462",
        "prompts": ["the colour of {} is", "we paint {} in"],
        "paraphrases": ["{} looks", "as for colour {} is", "people see {} as"],
        "generations": ["{} is", "the look of {}", "{} has"],
        "facts": {subject: OBJECTS[i % 3] for i, subject in enumerate(SUBJECTS)},
    }
    return {key: value for key, value in {**entry, **changes}.items() if value is not None}


def write_table(path, table):
    path.write_text(json.dumps(table), "utf-8")
    return path


@pytest.fixture(scope="module")
def tiny():
    """A random Llama and a tokenizer of whole words."""
    text = "the colour of is we paint in looks as for people see has look We The People As"
    words = text.split() + SUBJECTS + [subject.capitalize() for subject in SUBJECTS] + OBJECTS
    vocabulary = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class Oracle:
    """Knows every fact of a table but those named; a stand-in for a model."""

    def __init__(self, table, unknown=()):
        self.facts, self.unknown = table["facts"], set(unknown)

    def __call__(self, pairs):
        return {pair: self.nll(*pair) for pair in pairs}

    def nll(self, prompt, target):
        words = prompt.lower().split()
        subject = next(word for word in words if word in self.facts)
        right = self.facts[subject] == target
        return 1.0 if right != (subject in self.unknown) else 3.0


def test_shipped_records_are_many_and_balanced(records):
    assert len(records) >= 300
    counts = Counter(record["requested_rewrite"]["relation_id"] for record in records)
    assert len(counts) >= 10
    assert max(counts.values()) <= len(records) / 5
    assert [record["case_id"] for record in records] == list(range(len(records)))


def test_shipped_records_follow_the_schema(records):
    for record in records:
        rewrite, where = record["requested_rewrite"], record["case_id"]
        subject, true, new = rewrite["subject"], rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        assert set(record) == {
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "attribute_prompts",
            "generation_prompts",
        }, where
        assert rewrite["prompt"].count("{}") == 1, where
        assert true
        assert new
        assert true != new, where
        assert rewrite["relation_id"].startswith("P"), where
        assert len(record["paraphrase_prompts"]) == 2, where
        assert 5 <= len(record["neighborhood_prompts"]) <= 10, where
        assert 3 <= len(record["generation_prompts"]) <= 5, where
        for prompt in record["paraphrase_prompts"] + record["generation_prompts"]:
            assert subject.lower() in prompt.lower(), where
        for prompt in record["neighborhood_prompts"] + record["attribute_prompts"]:
            assert subject.lower() not in prompt.lower(), where
            assert "{}" not in prompt, where
        assert len(set(record["neighborhood_prompts"])) == len(record["neighborhood_prompts"]), where


def test_shipped_records_say_what_the_facts_say(records, facts):
    for record in records:
        rewrite = record["requested_rewrite"]
        subject, true = rewrite["subject"], rewrite["target_true"]["str"]
        home = [
            relation
            for relation in facts.values()
            if rewrite["prompt"] in relation.prompts and relation.facts.get(subject) == true
        ]
        assert home, rewrite
        assert rewrite["target_new"]["str"] in home[0].alternatives(true)
        told = {
            fill(template, other)
            for relation in facts.values()
            for other, value in relation.facts.items()
            if value == true
            for template in (*relation.prompts, *relation.paraphrases)
        }
        assert set(record["neighborhood_prompts"]) <= told, rewrite


def test_no_edited_fact_is_a_neighbor(records):
    """Neither of its own record nor of any other: sequential edits would overwrite it."""
    neighbors = {text for record in records for text in record["neighborhood_prompts"]}
    for record in records:
        rewrite = record["requested_rewrite"]
        assert fill(rewrite["prompt"], rewrite["subject"]) not in neighbors
        assert not neighbors & set(record["paraphrase_prompts"])


def test_builder_keeps_known_facts_apart_from_neighbors(tmp_path):
    table = relation()
    unknown = SUBJECTS[:6]
    config = StarterConfig(held_out=5, per_relation=6)
    built = build_starter(
        load_facts(write_table(tmp_path / "facts.json", {"colour": table})), Oracle(table, unknown), config
    )
    assert 0 < len(built) <= 6
    edited = {record["requested_rewrite"]["subject"] for record in built}
    assert not edited & set(unknown)
    for record in built:
        true = record["requested_rewrite"]["target_true"]["str"]
        assert len(record["neighborhood_prompts"]) >= 5
        for prompt in record["neighborhood_prompts"]:
            subject = next(word for word in prompt.lower().split() if word in table["facts"])
            assert table["facts"][subject] == true
            assert subject not in edited


def test_confusable_objects_never_replace_one_another(tmp_path):
    table = relation(confusable=[["red", "green"]])
    (loaded,) = load_facts(write_table(tmp_path / "facts.json", {"colour": table}))
    assert loaded.alternatives("red") == ["blue"]
    assert loaded.alternatives("blue") == ["green", "red"]


def test_builder_with_a_model_is_deterministic_and_keeps_what_it_prefers(tmp_path, tiny):
    relations = load_facts(write_table(tmp_path / "facts.json", {"colour": relation()}))
    config = StarterConfig(margin=0.0, held_out=3, neighbors=(0, 5))
    once = build_starter(relations, TargetScorer(*tiny), config)
    assert once == build_starter(relations, TargetScorer(*tiny, PassOptions(batch_tokens=64)), config)
    assert once
    nll = TargetScorer(*tiny)
    for record in once:
        rewrite = record["requested_rewrite"]
        texts = [rewrite["prompt"].replace("{}", rewrite["subject"]), *record["paraphrase_prompts"]]
        for text in texts:
            true, new = (text, rewrite["target_true"]["str"]), (text, rewrite["target_new"]["str"])
            scores = nll([true, new])
            assert scores[true] < scores[new]


def test_scorer_agrees_with_one_prompt_at_a_time(tiny):
    model, tokenizer = tiny
    pairs = [("the colour of subject1 is", "red"), ("we paint subject2 in", "green blue"), ("the", "blue")]
    nll = TargetScorer(model, tokenizer)(pairs)
    for prompt, target in pairs:
        ids, start = encode_pair(tokenizer, prompt, target)
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        plain = -torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))]).mean()
        assert nll[prompt, target] == pytest.approx(plain.item(), abs=1e-4)


@pytest.mark.parametrize(
    "entry, said",
    [
        (relation(facts=None), "lacks facts"),
        (relation(colour="red"), "unknown keys colour"),
        (relation(prompts=["the colour is"]), "without exactly one '{}'"),
        (relation(paraphrases=["{} looks"]), "at least 2 strings as paraphrases"),
        (relation(facts={"subject1": 3}), "map each subject to its object"),
        (relation(facts={"redwood": "red", "grass": "green"}), "gives the object away"),
        (relation(facts={"grass": "green", "moss": "green"}), "at least two objects"),
        (relation(confusable="red"), "list of lists"),
        (relation(relation_id=None), "lacks relation_id"),
        (["red"], "must be a JSON object"),
        (relation(facts={"gr\ud800": "green", "rose": "red"}), "half of a surrogate pair, U+D800"),
        (relation(prompts=["\udfff {} is", "{} has"]), "half of a surrogate pair, U+DFFF"),
    ],
)
def test_malformed_relation_is_one_sentence(tmp_path, entry, said):
    with pytest.raises(SphereError, match=r"[Rr]elation 'colour'") as error:
        load_facts(write_table(tmp_path / "facts.json", {"colour": entry}))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, said", [(None, "No facts table"), ("{", "not valid JSON"), ("[]", "JSON object")]
)
def test_unreadable_facts_end_the_command(tmp_path, capsys, content, said):
    path = tmp_path / "facts.json"
    if content is not None:
        path.write_text(content)
    assert main(["--facts", str(path), "--out", str(tmp_path / "out.json")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
