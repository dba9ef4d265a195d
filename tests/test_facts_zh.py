"""The Chinese facts that are shipped: sound records, whose subjects the default tokenizer's lookups complete."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sphere.data.records import Record, load_records
from sphere.embedded import DEFAULT_MODEL, part_files
from sphere.errors import SphereError
from sphere.values.compute_ks import ids_to_subject
from sphere.values.context_templates import fill
from sphere.values.joiner import joiner
from sphere.values.tokenization import changed_texts, encode
from sphere.values.z_batches import prompts_of


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return load_records("facts_zh")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The default model's own."""
    try:
        (file,) = part_files(DEFAULT_MODEL)
    except SphereError as error:
        pytest.skip(str(error))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_the_records_are_sound(records: list[Record]) -> None:
    assert len(records) == 40
    assert len({record.request.subject for record in records}) == 40
    edited = {record.request.subject for record in records}
    for record in records:
        request = record.request
        assert len(record.paraphrase_prompts) >= 2
        assert all(request.subject in prompt for prompt in record.paraphrase_prompts)
        assert len(record.neighborhood) >= 4
        before, _, after = request.prompt.partition("{}")
        for prompt, _ in record.neighborhood:
            assert prompt.removeprefix(before).removesuffix(after) not in edited
        for prompt in (request.text, *record.paraphrase_prompts):
            assert joiner(prompt, request.target_new) == joiner(prompt, str(request.target_true)) == ""


def test_every_lookup_completes_its_subject(
    records: list[Record], tokenizer: PreTrainedTokenizerBase
) -> None:
    several = 0  # subjects whose last character has several tokens
    for record in records:
        request = record.request
        for template in ("{}", "It rained. {}"):
            filled = fill(template, request)
            ids = ids_to_subject(tokenizer, template, request)
            up_to_subject = filled.text[: filled.subject_end]
            assert tokenizer.decode(ids) == up_to_subject
            assert tokenizer.decode(ids[:-1]) != up_to_subject
            (prompt,) = prompts_of(tokenizer, 0, request, [template], kl=False, merge=False)
            assert tuple(prompt.ids[: prompt.lookup + 1]) == ids
        encoded = encode(tokenizer, request.text)
        several += (
            encoded.token_at(request.subject_end - 1) < len(ids_to_subject(tokenizer, "{}", request)) - 1
        )
    assert several > 10
    texts = [text for r in records for text in (r.request.subject, r.request.target_new)]
    assert changed_texts(tokenizer, texts) == {}
