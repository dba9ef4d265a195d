"""z that stops once its target is likely enough: beside the plain path, for any method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_architectures import ARCHITECTURES, MORE, REQUESTS, tiny_hparams, tiny_model, tiny_tokenizer
from test_compute_z import assert_alike, fast
from tiny_run import method_values

from benchmarks.plain.target_values import plain_target_values
from sphere import get_method, hparams_from_dict
from sphere.hparams import ModuleHParams, TargetHParams
from sphere.values.compute_z import TargetValues

STEPS = 20
FACTS = [*REQUESTS, *MORE]
TEMPLATES = (("{}",), ("the language {}",))


def hparams_with(**stop: Any) -> TargetHParams:
    return dataclasses.replace(tiny_hparams("MEMIT", "Llama3-8B"), kl_factor=0.0, v_lr=0.1, **stop)


def found_with(hparams: TargetHParams) -> TargetValues:
    return fast(tiny_model(ARCHITECTURES["llama"][0]), tiny_tokenizer(), FACTS, hparams, TEMPLATES)


@pytest.mark.parametrize(
    "stop",
    [{"z_stop": 0}, {"z_stop": 3}, {"z_stop_probability": 0.08}, {"z_stop": 2, "z_stop_probability": 0.4}],
    ids=str,
)
def test_as_one_by_one(stop: dict[str, Any]) -> None:
    """Requests stop one after the other, each with the z of the step at which its target was likely enough."""
    model, hparams = tiny_model(ARCHITECTURES["llama"][0]), hparams_with(**stop)
    expected = plain_target_values(model, tiny_tokenizer(), FACTS, TEMPLATES, hparams)
    stopped = expected.steps < STEPS
    assert len(set(expected.steps[stopped].tolist())) > 1
    assert (expected.losses[stopped] > 0.05).any()  # the loss alone would not have stopped them
    assert_alike(found_with(hparams), expected)


def test_further_steps_are_taken_once_the_target_is_likeliest() -> None:
    first, later = (found_with(hparams_with(z_stop=further)).steps for further in (0, 2))
    assert torch.equal(later, (first + 2).clamp(max=STEPS))


def test_files_without_the_keys_stay_as_they_were() -> None:
    def written(**changes: Any) -> ModuleHParams:
        return hparams_from_dict(method_values("AlphaEdit", **changes), get_method("AlphaEdit").hparams_class)

    assert not {"z_stop", "z_stop_probability"} & written().to_dict().keys()
    assert written(z_stop=1).to_dict()["z_stop"] == 1
    assert hparams_from_dict(written(z_stop=1).to_dict(), type(written())) == written(z_stop=1)
