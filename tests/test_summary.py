"""Averages, intervals, harmonic means and the table, on cases whose numbers are known by hand."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
import scipy.stats

from sphere.errors import SphereError
from sphere.evaluation.summary import format_table, retention, summarise


def entry(success, accuracy=False, prob_diff=0.1):
    return {"success": success, "accuracy": accuracy, "prob_diff": prob_diff}


def case(rewrite, paraphrases=(), neighbors=(), **more):
    return {
        "kind": "counterfact",
        "rewrite": [entry(rewrite, rewrite)],
        "paraphrase": [entry(p) for p in paraphrases],
        "neighborhood": [entry(n) for n in neighbors],
        **more,
    }


def test_cases_count_once_however_many_prompts_they_have():
    result = summarise([case(True, [True, True, True, False], [True]), case(False, [False], [True, False])])
    assert result["n_cases"] == 2
    assert result["paraphrase_success"]["mean"] == pytest.approx((75 + 0) / 2)
    assert result["paraphrase_success"]["std"] == pytest.approx(37.5)
    assert result["neighborhood_success"]["mean"] == pytest.approx(75)
    assert result["efficacy_prob_diff"]["mean"] == pytest.approx(10)
    assert result["score"]["value"] == pytest.approx(statistics.harmonic_mean([50, 37.5, 75]))
    assert result["score_accuracy"]["value"] == 0  # no paraphrase is accurate
    json.dumps(result, allow_nan=False)


def test_missing_prompts_are_left_out_not_counted_as_zero():
    result = summarise([case(True, [True], [True]), case(True, [], [False])])
    assert result["paraphrase_success"]["mean"] == 100
    assert result["paraphrase_success"]["n"] == 1
    without = summarise([case(True), case(False)])
    assert "paraphrase_success" not in without
    assert without["score"] is None


def test_interval_is_the_percentile_bootstrap():
    rng = np.random.default_rng(0)
    hits = rng.random(200) < 0.7
    result = summarise([case(bool(hit)) for hit in hits])["efficacy_success"]
    expected = scipy.stats.bootstrap(
        (100.0 * hits,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert result["low"] == pytest.approx(expected.low, abs=1.0)
    assert result["high"] == pytest.approx(expected.high, abs=1.0)
    assert summarise([case(bool(hit)) for hit in hits])["efficacy_success"] == result  # seeded
    assert result["low"] < result["mean"] < result["high"]


def test_score_interval_holds_the_score():
    rng = np.random.default_rng(0)
    cases = [
        case(*(rng.random() < p for p in (0.9,)), rng.random(2) < 0.6, rng.random(5) < 0.7) for _ in range(80)
    ]
    score = summarise(cases)["score"]
    assert score["low"] < score["value"] < score["high"]
    assert score["high"] - score["low"] < 30


def test_generation_metrics():
    generated = {"generation": {"ngram_entropy": 6.0, "reference_score": 40.0}}
    result = summarise([case(True, **generated), case(True)])
    assert result["fluency"]["n"] == 1
    assert result["consistency"]["mean"] == 40
    assert "essence_perplexity" not in result


def test_zsre_names_both_neighborhood_accuracies():
    cases = [
        {
            "kind": "zsre",
            "rewrite": [{"accuracy": 1.0}],
            "paraphrase": [{"accuracy": 0.5}],
            "neighborhood": [{"accuracy_given_answer": 0.25, "accuracy_unedited_prediction": 1.0}],
        }
    ]
    result = summarise(cases)
    assert result["score"]["value"] == pytest.approx(statistics.harmonic_mean([100, 50, 25]))
    assert result["score_unedited_prediction"]["value"] == pytest.approx(
        statistics.harmonic_mean([100, 50, 100])
    )
    assert "neighbor (unedited)" in format_table([{"label": "a", "n_edits": 1, "metrics": result}])


def test_retention_by_thirds_of_the_order_of_editing():
    cases = [case(i >= 4) for i in range(7)]
    parts = retention(cases)
    assert [parts[name]["n_cases"] for name in ("first", "middle", "last")] == [3, 2, 2]
    assert [parts[name]["efficacy_success"]["mean"] for name in parts] == [0, 50, 100]
    assert list(retention(cases[:2])) == ["first", "middle"]


def test_nothing_to_summarise():
    with pytest.raises(SphereError, match="Cannot summarise 0 cases"):
        summarise([])
    with pytest.raises(SphereError, match="one kind"):
        summarise([case(True), {"kind": "zsre"}])


def test_table():
    metrics = summarise([case(True, [True], [True]), case(False, [True], [False])])
    rows = [{"label": "unedited", "n_edits": 0, "metrics": metrics}]
    lines = format_table({"checkpoints": rows}).splitlines()
    assert lines[0].split()[:4] == ["weights", "edits", "cases", "efficacy"]
    assert "50.0 [0.0, 100.0]" in lines[2]
    assert len({len(line) for line in lines}) == 1
    markdown = format_table(rows, markdown=True).splitlines()
    assert markdown[1].startswith("| --- | ---: |")
    assert len({line.count("|") for line in markdown}) == 1
