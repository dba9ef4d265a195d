"""Where subjects and targets lie among tokens: fast and slow tokenizers, BOS, EOS, characters of several bytes."""

from __future__ import annotations

import unicodedata

import pytest
from conftest import LLAMA_MODULES as MODULES
from conftest import REQUESTS, tiny_hparams, tiny_llama
from tiny_run import method_values
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from benchmarks.plain import tokens as plain
from sphere import Editor, EditRequest, SphereError, hparams_from_dict
from sphere.evaluation.generation import continue_prompts
from sphere.evaluation.scoring import RecordScorer
from sphere.forward.layers import LayerStack
from sphere.methods import get_method
from sphere.requests import check_batch
from sphere.values.compute_ks import ids_to_subject
from sphere.values.compute_z import compute_z
from sphere.values.context_templates import fill
from sphere.values.tokenization import (
    bos_text,
    changed_texts,
    encode,
    encode_pair,
    padding_id,
    subject_token,
    tokenizer_digest,
    truncated_ids,
)
from sphere.values.z_batches import prompts_of

BOS, EOS = 257, 258


class SlowBytes(PreTrainedTokenizer):
    """A tokenizer without offsets: bytes, with BOS before and, where asked for, EOS behind."""

    def __init__(self, add_eos: bool = False) -> None:
        self.add_eos = add_eos
        super().__init__(bos_token="<s>", eos_token="</s>")

    @property
    def vocab_size(self) -> int:
        return 257

    def get_vocab(self) -> dict[str, int]:
        return {chr(256 + i): i for i in range(257)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [chr(256 + b) for b in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 256

    def _convert_id_to_token(self, index: int) -> str:
        return chr(256 + index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(t) - 256 for t in tokens).decode("utf-8", "replace")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, *([self.eos_token_id] if self.add_eos else [])]


def fast(tiny_tokenizer, single: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with BOS "<s>" and EOS "</s>", put around texts as `single` says."""
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


KINDS = {
    "plain": lambda tiny: tiny,
    "BOS": lambda tiny: fast(tiny, "<s> $A"),
    "BOS and EOS": lambda tiny: fast(tiny, "<s> $A </s>"),
    "slow": lambda tiny: SlowBytes(),
    "slow with EOS": lambda tiny: SlowBytes(add_eos=True),
}


@pytest.fixture(params=KINDS)
def tokenizer(request, tiny_tokenizer):
    return KINDS[request.param](tiny_tokenizer)


def test_the_kinds_are_what_they_are_called(tiny_tokenizer):
    slow = KINDS["slow with EOS"](tiny_tokenizer)
    assert not slow.is_fast
    assert slow("ab")["input_ids"] == [BOS, ord("a"), ord("b"), EOS]
    assert slow.decode([ord("a"), ord(" "), ord("b")]) == "a b"
    assert KINDS["BOS and EOS"](tiny_tokenizer)("ab")["input_ids"][0] == 257


def test_every_token_ends_where_its_character_does(tokenizer):
    text = "Ann Lee is here"
    encoded = encode(tokenizer, text)
    begins = len(encoded.ids) - len(text)  # a BOS, or nothing
    assert begins == (tokenizer.bos_token_id is not None)
    assert encoded.ends == [0] * begins + list(range(1, len(text) + 1))
    assert encoded.ids[-1] != tokenizer.eos_token_id
    assert [encoded.token_at(i) for i in (0, 14)] == [begins, 14 + begins]
    with pytest.raises(IndexError):
        encoded.token_at(len(text))


@pytest.mark.parametrize("text", ["Zoë of Łódź", "東京 is", "a😀b"])
def test_a_character_of_several_bytes_begins_at_its_first_token(tokenizer, text):
    encoded = encode(tokenizer, text)
    begins = tokenizer.bos_token_id is not None
    for position, character in enumerate(text):
        at = encoded.token_at(position)
        assert at == begins + len(text[:position].encode()), character


SUBJECTS = [
    "中国",
    "Zoë",
    unicodedata.normalize("NFD", "Zoë"),
    "a😀",
    "👩‍👩‍👧",
    "القاهرة",
    "חיפה",
    "กรุงเทพฯ",
    "Łódź",
    "Ann",
]


@pytest.mark.parametrize("prompt", ["{}的首都是", "{} is", "The mother tongue of {}", "{}"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_lookup_is_the_token_that_completes_the_subject(tokenizer, prompt, subject):
    request = EditRequest(0, prompt, subject, "纽约")
    for template in ("{}", "It rained. {}"):
        ids = ids_to_subject(tokenizer, template, request)
        text = fill(template, request).text[: fill(template, request).subject_end]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids[:-1], skip_special_tokens=True) != text
        found = prompts_of(tokenizer, 0, request, [template], kl=True, merge=False)
        assert tuple(found[0].ids[: found[0].lookup + 1]) == ids
        assert tokenizer.decode(found[1].ids, skip_special_tokens=True) == subject  # the KL prompt


def merging(tiny_tokenizer, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges: some of its tokens are parts of characters, some reach over two."""
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_tokens_that_are_parts_of_characters_or_reach_over_two(tiny_tokenizer):
    tokenizer = merging(tiny_tokenizer, ["国的 国的 中国 国 国是 是国 囗 因 固 的目"] * 3)
    for text, subject in (("中国的首都", "中国"), ("国是", "国"), ("固的目", "固的"), ("因国", "因")):
        encoded = encode(tokenizer, text)
        lookup = subject_token(encoded, len(subject), "case 0")
        whole = [tokenizer.decode(encoded.ids[: n + 1]).startswith(subject) for n in range(len(encoded.ids))]
        assert lookup == whole.index(True)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_tokenizers_that_normalise(tiny_tokenizer, form, written):
    """What they drop of a character belongs to the token before it."""
    tokenizer = fast(tiny_tokenizer, "<s> $A")
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    subject = unicodedata.normalize(written, "Zoë")
    for prompt in ("{} is", "{}", "Is {}"):
        ids = ids_to_subject(tokenizer, "{}", EditRequest(0, prompt, subject, "x"))
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded == unicodedata.normalize(form, prompt.partition("{}")[0] + subject)


def test_bytes_that_stand_for_unknown_characters():
    """Of a vocabulary like Llama's: "▁" for blanks, bytes for what it has no piece for."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {c: 256 + i for i, c in enumerate("▁abis")}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a")
    ids = ids_to_subject(tokenizer, "{}", EditRequest(0, "a {} is", "国", "b"))
    assert bytes(ids[-3:]).decode() == "国"


def test_blanks_behind_a_subject_are_no_part_of_it(tokenizer, caplog):
    request = EditRequest(0, "The mother tongue of {}is", "Danielle Darrieux ", "English")
    trimmed = EditRequest(0, "The mother tongue of {} is", "Danielle Darrieux", "English")
    assert request.text == trimmed.text
    assert request.subject_end == trimmed.subject_end
    for template in ("{}", "So. {}"):
        assert ids_to_subject(tokenizer, template, request) == ids_to_subject(tokenizer, template, trimmed)
        own, other = (
            prompts_of(tokenizer, 0, r, [template], kl=True, merge=False) for r in (request, trimmed)
        )
        assert [(p.ids, p.lookup) for p in own] == [(p.ids, p.lookup) for p in other]
    others = [EditRequest(i, "{}is", f"Ann {i}\u3000", "x") for i in range(1, 6)]
    (warning,) = check_batch([request, *others, trimmed])
    assert "case 0 'Danielle Darrieux ', case 1" in warning
    assert "and 3 more" in warning
    assert caplog.messages == [warning]


def test_texts_that_a_tokenizer_changes_are_told_once(tiny_tokenizer, caplog):
    lower = fast(tiny_tokenizer, "<s> $A")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert changed_texts(lower, ["Ann Lee", "bo", "Zoë"]) == {"Ann Lee": "ann lee", "Zoë": "zoë"}
    assert (
        changed_texts(SlowBytes(), ["Ann Lee", "国"]) == changed_texts(tiny_tokenizer, [" Rome", "国"]) == {}
    )
    for tokenizer, told in ((lower, 1), (tiny_tokenizer, 0)):
        hparams = hparams_from_dict(method_values("FT"), get_method("FT").hparams_class)
        editor = Editor(tiny_llama(), tokenizer, "FT", hparams, progress=False)
        reports = [editor.edit(REQUESTS[:1]), editor.edit(REQUESTS[1:])]
        assert [len(report.warnings) for report in reports] == [told, 0]
    assert caplog.text.count("reads 2 of 2 subjects and targets otherwise ('Ann Lee' as 'ann lee'") == 1


def test_a_target_begins_behind_its_prompt(tokenizer):
    ids, start = encode_pair(tokenizer, "Ann is", "Welsh")
    assert tokenizer.decode(ids[start:]) in ("Welsh", " Welsh")
    assert start - (tokenizer.bos_token_id is not None) in (6, 7)
    assert ids == encode(tokenizer, "Ann is Welsh").ids
    assert encode_pair(tokenizer, "Ann is", " Welsh") == (ids, start)
    assert encode_pair(tokenizer, "", "X")[1] >= 1  # the first token has nothing to be predicted from


def test_a_subject_ends_at_its_last_token(tokenizer):
    for request in REQUESTS:
        filled = fill("So. {}", request)
        encoded = encode(tokenizer, filled.text)
        lookup = subject_token(encoded, filled.subject_end, "case 0")
        cut = tokenizer.decode(encoded.ids[: lookup + 1], skip_special_tokens=True)
        assert cut == filled.text[: filled.subject_end]
    with pytest.raises(SphereError, match="case 7"):
        subject_token(encoded, 1000, "case 7")


def test_as_decoding_one_more_token_at_a_time(tokenizer):
    """The oracle of z and keys finds the same by means of its own."""
    for request in [*REQUESTS, EditRequest(9, "{}", "Łódź", "Zoë"), EditRequest(8, "Why {} is", "Q", " x")]:
        for template in ("{}", "It rained. {}"):
            text, ids = plain.to_subject(tokenizer, template, request)
            assert text == fill(template, request).text
            assert tuple(ids) == ids_to_subject(tokenizer, template, request)
            found, start = encode_pair(tokenizer, text, request.target_new)
            expected, its_start = plain.with_target(tokenizer, text, request.target_new)
            assert found == expected
            assert start in (its_start, its_start - 1)  # the space is a token of its own here


# ---- BOS ----


@pytest.mark.parametrize("kind", ["BOS", "BOS and EOS", "slow", "slow with EOS"])
def test_a_text_that_begins_with_bos_gets_no_second_one(kind, tiny_tokenizer):
    tokenizer = KINDS[kind](tiny_tokenizer)
    without, own = encode(tokenizer, "Ann is"), encode(tokenizer, "<s>Ann is")
    assert own.ids == without.ids
    assert own.ends == [3, *(end + 3 for end in without.ends[1:])]
    assert own.token_at(3) == without.token_at(0) == 1
    pair, start = encode_pair(tokenizer, "<s>Ann is", "Welsh")
    assert (pair, start) == encode_pair(tokenizer, "Ann is", "Welsh")
    assert truncated_ids(tokenizer, "<s>Ann is", 100) == truncated_ids(tokenizer, "Ann is", 100) == own.ids


def test_a_bos_of_the_text_stays_where_the_tokenizer_adds_none(tiny_tokenizer):
    tokenizer = fast(tiny_tokenizer, "$A")
    assert encode(tokenizer, "<s>A").ids == [tokenizer.bos_token_id, encode(tokenizer, "A").ids[0]]


def test_prompts_with_their_own_bos_in_templates_z_scoring_and_generation(tiny_tokenizer):
    tokenizer = fast(tiny_tokenizer, "<s> $A")
    model, hparams = tiny_llama(), tiny_hparams(MODULES, v_num_grad_steps=2)
    without = EditRequest(0, "{} is in", "Ann", "Rome", "Oslo")
    own = EditRequest(0, "<s>{} is in", "Ann", "Rome", "Oslo")
    for template in ("{}", "It rained. {}"):
        ids = ids_to_subject(tokenizer, template, own)
        assert ids == ids_to_subject(tokenizer, template, without)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert fill(template, own, bos_text(tokenizer)).text == "<s>" + fill(template, without).text
    stack, templates = LayerStack(model, hparams), (("{}",), ("It rained. {}",))
    found = [compute_z(stack, tokenizer, [r], templates, hparams, progress=False).z for r in (own, without)]
    assert found[0].equal(found[1])
    from sphere.data.records import Record

    scores = [RecordScorer(model, tokenizer).score([Record(0, r)], False)[0] for r in (own, without)]
    assert scores[0]["rewrite"][0]["nll_new"] == scores[1]["rewrite"][0]["nll_new"]
    texts = continue_prompts(model, tokenizer, ["<s>Ann is", "Ann is"], [3, 3], 20)
    assert texts[0] == texts[1]


def test_ids_for_a_corpus_are_cut(tokenizer):
    whole = encode(tokenizer, "Ann is here").ids
    assert truncated_ids(tokenizer, "Ann is here", 100) == whole
    cut = truncated_ids(tokenizer, "Ann is here", 5)
    assert cut == whole[: len(cut)]
    assert 4 <= len(cut) <= 5


def test_padding_is_some_token(tiny_tokenizer):
    assert padding_id(tiny_tokenizer) == tiny_tokenizer.eos_token_id
    assert padding_id(SlowBytes()) == EOS


def test_digests_tell_tokenizers_apart(tiny_tokenizer):
    digests = {name: tokenizer_digest(make(tiny_tokenizer)) for name, make in KINDS.items()}
    assert len({digests[name] for name in ("plain", "BOS", "BOS and EOS", "slow")}) == 4
    again = fast(tiny_tokenizer, "<s> $A")
    again("a b c", truncation=True, max_length=2)  # leaves its marks on the tokenizer
    assert tokenizer_digest(again) == digests["BOS"]
