"""Paired differences, beside a plain bootstrap; the perplexity of a text, beside a plain forward pass."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama

from sphere.errors import SphereError
from sphere.evaluation.paired import paired_differences
from sphere.evaluation.perplexity import TEXT_NAME, read_paragraphs, text_perplexity
from sphere.forward.scorer import PackedScorer
from sphere.hypersphere import rotation

ROOT = Path(__file__).parents[1]


def cases(seed: int, n: int = 40, first: int = 0) -> list[dict[str, object]]:
    """CounterFact cases with random outcomes."""
    rng = np.random.default_rng(seed)

    def entries() -> list[dict[str, object]]:
        return [
            {
                "success": bool(rng.random() < 0.6),
                "accuracy": bool(rng.random() < 0.3),
                "prob_diff": rng.random(),
            }
        ]

    return [
        {"case_id": first + i, "kind": "counterfact", "rewrite": entries(), "paraphrase": entries()}
        | {"neighborhood": entries()}
        for i in range(n)
    ]


def test_equal_runs_do_not_differ() -> None:
    found = paired_differences(cases(0), cases(0))
    assert found["n_cases"] == 40
    for name, entry in found.items():
        if name != "n_cases":
            assert entry == {"difference": 0, "low": 0, "high": 0}, name


def test_differences_are_those_of_the_means_over_common_facts() -> None:
    first, second = cases(1), cases(2, first=10)
    found = paired_differences(first, second)
    assert found["n_cases"] == 30

    def mean(chosen: list[dict], section: str) -> float:
        return 100 * float(np.mean([case[section][0]["success"] for case in chosen]))

    pairs = first[10:], second[:30]
    parts = [[mean(chosen, s) for s in ("rewrite", "paraphrase", "neighborhood")] for chosen in pairs]
    assert found["efficacy_success"]["difference"] == pytest.approx(parts[1][0] - parts[0][0])
    scores = [3 / sum(1 / value for value in values) for values in parts]
    assert found["score"]["difference"] == pytest.approx(scores[1] - scores[0])
    assert found["score"]["low"] <= found["score"]["difference"] <= found["score"]["high"]


def test_the_interval_is_that_of_resampled_pairs() -> None:
    first, second = cases(3, 200), cases(4, 200)
    found = paired_differences(first, second)["efficacy_success"]
    outcome = np.array([[c["rewrite"][0]["success"] for c in run] for run in (first, second)], dtype=float)
    change = 100 * (outcome[1] - outcome[0])
    rng = np.random.default_rng(9)
    draws = [change[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found["low"] == pytest.approx(low, abs=1)
    assert found["high"] == pytest.approx(high, abs=1)


def test_runs_without_common_facts_cannot_be_compared() -> None:
    with pytest.raises(SphereError, match="0 facts in common"):
        paired_differences(cases(0), cases(0, first=100))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_perplexity_equals_a_plain_pass(make, tiny_tokenizer) -> None:
    model, paragraphs = make(), ["The river runs to the sea.", "Bread is made of flour."]
    total, count = 0.0, 0
    for paragraph in paragraphs:
        ids = tiny_tokenizer(paragraph, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(logits.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    found = text_perplexity(PackedScorer(model), tiny_tokenizer, paragraphs)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_broken_model_has_no_perplexity(tiny_tokenizer) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert text_perplexity(PackedScorer(model), tiny_tokenizer, ["Some text."]) is None


def test_the_shipped_text_is_read_by_paragraphs(tmp_path) -> None:
    assert len(read_paragraphs(ROOT / "data" / TEXT_NAME)) == 7
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("empty.txt", "none.txt"):
        with pytest.raises(SphereError, match=name):
            read_paragraphs(tmp_path / name)


def test_rotation_of_subspaces() -> None:
    basis = torch.linalg.qr(torch.randn(20, 6, generator=torch.Generator().manual_seed(0))).Q
    assert rotation(basis[:, :3], basis[:, :3]) == pytest.approx(0, abs=1e-6)
    assert rotation(basis[:, :3], basis[:, 3:]) == pytest.approx(1, abs=1e-6)
    assert rotation(basis[:, :2], basis) == pytest.approx(0, abs=1e-6)  # lies in the larger one
    angle = 0.3
    turned = math.cos(angle) * basis[:, :1] + math.sin(angle) * basis[:, 1:2]
    assert rotation(basis[:, :1], turned) == pytest.approx(math.sin(angle) ** 2, rel=1e-4)
