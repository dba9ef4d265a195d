"""The table of a sweep."""

from __future__ import annotations

import pytest

from sphere.errors import SphereError
from sphere.runs.sweep_table import collect, over_seeds


def test_means_over_seeds():
    def row(seed: int, value: float | None, beta_hse: float = 0.5) -> dict:
        metrics = {"kind": "zsre", "score": None if value is None else {"value": value}}
        metrics["efficacy_accuracy"] = {"mean": 2.0 * seed}
        rest = {"alg_name": "A", "model_name": "m", "ds_name": "d", "num_edits": 1, "alpha": 1.0}
        rest |= {
            "dataset_size_limit": None,
            "hparams_fname": None,
            "dtype": "auto",
            "z_matmul_dtype": "model",
        }
        return {**rest, "seed": seed, "beta_hse": beta_hse, "label": f"A seed={seed}", "metrics": metrics}

    (mean,) = over_seeds([row(0, 1.0), row(1, 3.0), row(0, 5.0, beta_hse=0.0)])
    assert (mean["label"], mean["n"]) == ("A", 2)
    assert mean["metrics"]["score"] == pytest.approx((2.0, 2**0.5))
    assert mean["metrics"]["efficacy_accuracy"] == pytest.approx((1.0, 2**0.5))
    (mean,) = over_seeds([row(0, None), row(1, None)])
    assert "score" not in mean["metrics"]


def test_nothing_to_collect(tmp_path):
    with pytest.raises(SphereError, match="No job has begun"):
        collect(tmp_path)
