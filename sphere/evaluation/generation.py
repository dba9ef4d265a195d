"""Free continuations of generation prompts, and what they show of an edit: fluency, consistency, essence.

The generation metrics of CounterFact (Meng et al. 2022, ROME, arXiv 2202.05262, section 3.4):

    fluency        entropy of a text's bigrams and trigrams in bits, weighted 2/3 and 4/3 and averaged over the two;
                   then averaged over the case's texts. Repetitive text has little.
    consistency    tf-idf cosine between the case's texts and the reference texts of the new target.
    essence        perplexity of the texts about the edited subject, which an edit should not change.

As there, a text is a prompt continued to 100 tokens by sampling from the 5 likeliest tokens, and an end-of-text token
does not end it (shorter texts would have less entropy). Random numbers are drawn per case and prompt, not per batch:
a text depends on the seed and the model, not on what it was generated with (but for rounding), and all checkpoints
of a run meet the same ones.

Knows models, records and texts. Knows nothing of checkpoints, averages over cases, or files.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from sphere.data.records import Record
from sphere.distributed import Processes
from sphere.evaluation.reference_texts import load_references
from sphere.forward.generate import generate
from sphere.forward.packing import Scored
from sphere.forward.padding import group_by_length
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer
from sphere.values.chat_template import in_turn
from sphere.values.context_templates import BARE
from sphere.values.joiner import Continued
from sphere.values.lengths import longest_sequence
from sphere.values.tokenization import encode, padding_id

TOP_K = 5
MAX_TOKENS = 100  # of a text, its prompt included
ESSENCE_TOKENS = 100
NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
FORMAT = 1  # of what `CaseGenerator.generate` returns; a change has every case generated again

Generation = dict[str, Any]


# ---- text ----


class _SeededTopK(LogitsProcessor):
    """Chooses among the k likeliest tokens by given random numbers, and leaves only the chosen one possible.

    Args:
        uniforms: (b, T) in [0, 1): row i chooses its t-th new token by uniforms[i, t].
        width: tokens of a row before the first new one, padding included.
    """

    def __init__(self, uniforms: Tensor, width: int, top_k: int) -> None:
        self.uniforms, self.width, self.top_k = uniforms, width, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        k = min(self.top_k, scores.shape[-1])
        logits, tokens = scores.float().topk(k)  # (b, k), likeliest first
        cumulative = logits.softmax(-1).cumsum(-1)
        drawn = self.uniforms[:, input_ids.shape[1] - self.width, None].to(scores.device)  # (b, 1)
        rank = (drawn >= cumulative).sum(-1, keepdim=True).clamp(max=k - 1)  # (b, 1); NaN: the first
        return torch.full_like(scores, -math.inf).scatter(-1, tokens.gather(-1, rank), 0.0)


def continue_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    max_tokens: int = MAX_TOKENS,
    top_k: int = TOP_K,
    user_turn: str = BARE,
) -> list[str]:
    """Sample continuations of prompts, in one batch with a KV cache.

    Args:
        seeds: one per prompt; a row's random numbers are its own.
        max_tokens: length of each text in tokens, its prompt included (a longer prompt stays as it is); the model's
            positions, where they are fewer. What a user's turn puts around the prompt does not count.
        user_turn: what prompts are put into: "{}", or a chat template's (`sphere.values.chat_template`).

    Returns:
        Prompt and continuation, without special tokens, in Unicode's composed form, white space as single spaces.
    """
    if not prompts:
        return []
    asked = [encode(tokenizer, in_turn(user_turn, prompt)).ids for prompt in prompts]
    width, shortest = max(map(len, asked)), min(map(len, asked))
    positions = longest_sequence(model)
    around = 0 if user_turn == BARE else len(encode(tokenizer, in_turn(user_turn, "")).ids)
    longest = min(max_tokens + around, positions or max_tokens + around)
    rows, new = asked, max(longest - shortest, 0)
    if new and positions and shortest < width and width + new > positions:  # together they do not fit
        alone = [
            continue_prompts(model, tokenizer, [prompt], [seed], max_tokens, top_k, user_turn)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [text for (text,) in alone]
    if new:
        uniforms = torch.stack(
            [torch.rand(new, generator=torch.Generator().manual_seed(seed)) for seed in seeds]  # (b, new)
        )
        config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=padding_id(tokenizer))
        ids = generate(model, asked, config, _SeededTopK(uniforms, width, top_k))  # (b, width + new)
        rows = [
            full[width - len(row) :][: max(longest, len(row))]
            for full, row in zip(ids.tolist(), asked, strict=True)
        ]
    if user_turn != BARE:
        answers = [row[len(own) :] for row, own in zip(rows, asked, strict=True)]
        decoded = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [_clean(Continued(*pair).text) for pair in zip(prompts, decoded, strict=True)]
    return [_clean(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


# ---- fluency ----


class WordTokenizer:
    """Words and punctuation by nltk's tokenizer, sentence by sentence, with nothing to download.

    spaCy's rule-based sentencizer stands in for nltk's trained one: a final full stop is a token of its own.
    """

    def __init__(self) -> None:
        import spacy  # seconds to load, and only fluency needs them
        from nltk.tokenize import NLTKWordTokenizer

        self._sentences = spacy.blank("en")
        self._sentences.add_pipe("sentencizer")
        self._words = NLTKWordTokenizer()

    def __call__(self, text: str) -> list[str]:
        """The text's words, in order."""
        return [word for s in self._sentences(text).sents for word in self._words.tokenize(s.text)]


def ngram_entropy(words: Sequence[str], weights: Mapping[int, float] | None = None) -> float:
    """Mean over n of weight_n * H_n, where H_n is the entropy of the text's n-grams in bits (0 where it has none).

    Args:
        weights: n -> weight; 2/3 for bigrams and 4/3 for trigrams by default.
    """
    weights = NGRAM_WEIGHTS if weights is None else weights
    return sum(w * _entropy(words, n) for n, w in weights.items()) / len(weights)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(islice(words, i, None) for i in range(n)), strict=False))
    total = counts.total()
    return sum(c / total * math.log2(total / c) for c in counts.values())


# ---- a case ----


class CaseGenerator:
    """Generates and measures the texts of every so-many-th case, under one model whose weights may change.

    Args:
        cases: the edited records, in the order of editing.
        dataset: all records at hand; see `load_references`.
        interval: every so-many-th case, beginning with the first; 0 or below: none.
        data_dir: where the published reference texts are.
        passes: how forward passes are cut, those that generate and those that score essence texts.
        user_turn: what prompts are put into; see `continue_prompts`.
        processes: the main one reads or fetches the reference texts, all of them use the same ones.

    Attributes:
        key: of a case, under which its texts stand.
        notes: in words, which cases are generated and what they are compared with.
    """

    key = "generation"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[Record],
        dataset: Sequence[Record],
        *,
        interval: int,
        seed: int = 0,
        data_dir: str | Path = "data",
        passes: PassOptions | None = None,
        user_turn: str = BARE,
        processes: Processes | None = None,
    ) -> None:
        self.user_turn = user_turn
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.interval, self.passes = max(interval, 0), passes or PassOptions()
        self.notes: dict[str, str] = {}
        asked = list(cases[::interval]) if interval > 0 else []
        chosen = [record for record in asked if record.generation_prompts]
        self._case_ids = {record.case_id for record in chosen}
        if asked:
            self.notes["generation"] = _which(interval, len(cases), len(asked), len(chosen))
        if chosen:
            self.references = (processes or Processes()).on_main(
                lambda: load_references(chosen, dataset, data_dir)
            )
            self.notes |= self.references.notes
            self._words = WordTokenizer()
            self._scorer = PackedScorer(model, self.passes)

    def wants(self, record: Record) -> bool:
        """Is text generated for this case?"""
        return record.case_id in self._case_ids

    def settings(self, record: Record) -> str:
        """A digest that changes with whatever, besides model and record, the case's generation depends on."""
        own = [FORMAT, self.seed, MAX_TOKENS, TOP_K, self.references.digest(record.case_id)]
        own += [] if self.user_turn == BARE else [self.user_turn]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def generate(self, records: Sequence[Record]) -> list[Generation]:
        """Texts of the records' generation prompts, and their metrics.

        Returns:
            JSON-able, one per record: settings (a digest), seed, texts (one per prompt), ngram_entropy (bits),
            reference_score (percent; None without references), n_references, and where there are essence texts
            essence_perplexity (None if not finite).
        """
        asked = [(r, i, prompt) for r in records for i, prompt in enumerate(r.generation_prompts)]
        texts = iter(
            self._texts(
                [prompt for *_, prompt in asked],
                [_seed(self.seed, record.case_id, i) for record, i, _ in asked],
            )
        )
        perplexities = self._essence_perplexities(records)
        return [
            self._measured(r, list(islice(texts, len(r.generation_prompts))))
            | ({"essence_perplexity": perplexities[r.case_id]} if r.case_id in perplexities else {})
            for r in records
        ]

    def _texts(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """The prompts' texts, as many at a time as one pass may hold."""
        lengths = [len(encode(self.tokenizer, in_turn(self.user_turn, prompt)).ids) for prompt in prompts]
        texts = [""] * len(prompts)
        for group in group_by_length(lengths, self.passes.decoding_tokens):
            chosen, own = [prompts[i] for i in group], [seeds[i] for i in group]
            made = continue_prompts(self.model, self.tokenizer, chosen, own, user_turn=self.user_turn)
            for i, text in zip(group, made, strict=True):
                texts[i] = text
        return texts

    def _measured(self, record: Record, texts: list[str]) -> Generation:
        similarity = self.references.similarity(texts, record.case_id)
        return {
            "settings": self.settings(record),
            "seed": self.seed,
            "texts": texts,
            "ngram_entropy": sum(ngram_entropy(self._words(text)) for text in texts) / len(texts),
            "reference_score": None if similarity is None else 100 * similarity,
            "n_references": len(self.references.by_case[record.case_id].consistency),
        }

    def _essence_perplexities(self, records: Sequence[Record]) -> dict[int, float | None]:
        """case_id -> exp of the mean NLL of its joined essence texts' first 100 tokens, given those before.

        The mean is over the predicted tokens; ROME's code divides their sum by one more.
        """
        sequences = {}
        most = min(ESSENCE_TOKENS, longest_sequence(self.model) or ESSENCE_TOKENS)
        for record in records:
            text = " ".join(self.references.by_case[record.case_id].essence)
            ids = tuple(encode(self.tokenizer, text).ids[:most]) if text else ()
            if len(ids) > 1:
                sequences[record.case_id] = Scored(ids, 1)
        scores = self._scorer.score(list(sequences.values()))
        means = {case_id: float(scores[sequence].nll.mean()) for case_id, sequence in sequences.items()}
        return {case_id: math.exp(nll) if nll < 700 else None for case_id, nll in means.items()}


def _seed(seed: int, case_id: int, index: int) -> int:
    """Of one text: the same for every checkpoint, another one for every case and prompt."""
    digest = hashlib.sha256(f"{seed} {case_id} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def _which(interval: int, n_cases: int, n_asked: int, n_chosen: int) -> str:
    note = f"cases 0, {interval}, {2 * interval}, ... in the order of editing: {n_chosen} of {n_cases}"
    if n_chosen < n_asked:
        note += f" ({n_asked - n_chosen} more have no generation prompts: no text for them)"
    return note
