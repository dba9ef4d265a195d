"""Hyperparameter files in the layouts of other projects load, and the log says what became of their keys."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GPT2_MODULES, LLAMA_MODULES
from tiny_run import TinyRun, flags, method_values
from transformers import PreTrainedTokenizerBase

from sphere.commands import edit
from sphere.commands.common import config_of
from sphere.errors import SphereError
from sphere.hparams import load_hparams
from sphere.methods import get_method
from sphere.runs.plan import plan_run
from sphere.runs.resolve import alpha_of, beta_hse_of, folder_of
from sphere.runs.run import execute

TARGET = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 5e-1,
    "v_loss_layer": 3,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
ROME = {
    "layers": [1],
    **TARGET,
    "context_template_length_params": [[5, 10], [10, 10]],
    **GPT2_MODULES,
    "lm_head_module": "transformer.wte",
}
FT = {
    "model_name": "tiny",
    "layers": [1],
    "num_steps": 25,
    "lr": 5e-4,
    "weight_decay": 0,
    "kl_factor": 0,
    "norm_constraint": False,
    **LLAMA_MODULES,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight",
}
EASYEDIT = """
alg_name: "SPHERE"
model_name: "./hugging_cache/tiny"
stats_dir: "./data/stats"
# the projector
P_loc: "./null_space_project.pt"
device: 0
layers: [1, 2]
clamp_norm_factor: 0.75
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 3
v_lr: 1e-1
v_loss_layer: 3
v_weight_decay: 0.5
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "self"
mom2_n_samples: 8
mom2_dtype: "float32"
nullspace_threshold: 2e-2
L2: 1
model_parallel: false
"""


def load(method: str, path: Path, content: dict[str, Any] | str) -> Any:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_hparams(path, get_method(method).hparams_class)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sphere")
    return caplog


def test_rome(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    hparams = load("ROME", tmp_path / "gpt2-xl.json", ROME)
    assert (hparams.layers, hparams.lm_head_module) == ((1,), "transformer.wte")
    (line,) = said.messages
    assert "without effect here: context_template_length_params" in line


def test_ft(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    hparams = load("FT", tmp_path / "tiny.json", FT)
    assert hparams.rewrite_module_tmp == LLAMA_MODULES["rewrite_module_tmp"]
    assert hparams.norm_constraint is None
    (line,) = said.messages
    for part in ("names a weight", "norm_constraint false is null", "without effect here: kl_factor"):
        assert part in line
    bound = load("FT", tmp_path / "tiny.json", {**FT, "norm_constraint": 5e-5, "wd_power_law": None})
    assert bound.norm_constraint == 5e-5


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("wd_power_law", [0.5, 1.0], r"wd_power_law must be null .*got \[0.5, 1.0\]"),
        ("objective_optimization", "prompt_last", 'objective_optimization must be "target_new" .*"prompt_last"'),
        ("fp16", True, "fp16 must be false .*dtype"),
        ("warm_up", 3, "unknown warm_up"),
    ],
)  # fmt: skip
def test_what_may_decide_something_is_an_error(key: str, value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SphereError, match=says):
        load("FT", tmp_path / "tiny.json", {**FT, key: value})


def test_a_file_of_ones_own_says_nothing(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    for method in ("AlphaEdit", "FT", "ROME", "MEMIT"):
        load(method, tmp_path / "tiny.json", method_values(method))
    assert not said.messages


def test_easyedit(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """Numbers such as 1e-1 are numbers there, though YAML says strings."""
    text = EASYEDIT + "cumulative_ratio: 0.4\nsuppression_strength: 0.25\n"
    hparams = load("AlphaEdit", tmp_path / "tiny.yaml", text)
    assert (hparams.v_lr, hparams.nullspace_threshold, hparams.L2) == (0.1, 0.02, 1.0)
    (line,) = said.messages
    assert "cumulative_ratio 0.4 is beta_hse" in line
    assert "suppression_strength 0.25 is alpha" in line
    assert "without effect here: stats_dir, P_loc, device, model_parallel" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers: [1, 2\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold a YAML mapping, got list"),
        ("layers: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        (EASYEDIT + "cumulative_ratio: high\n", "cumulative_ratio must be a number or 'auto', got 'high'"),
        (
            EASYEDIT + "suppression strength: 0.5\nsuppresion_strength: 0.4\n",
            "suppresion_strength 0.4 contradicts another key for alpha",
        ),
    ],
)
def test_bad_yaml(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SphereError, match=says):
        load("AlphaEdit", tmp_path / "tiny.yaml", text)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> TinyRun:
    """A tiny world with EasyEdit's file for AlphaEdit beside its own."""
    world = TinyRun(tmp_path, tiny_tokenizer, 2)
    text = EASYEDIT.replace("nullspace_threshold: 2e-2", "nullspace_threshold: 0.5")
    text += "cumulative_ratio: 0.4\nsuppression strength: 0.25\n"
    (tmp_path / "hparams" / "AlphaEdit" / "peer.yaml").write_text(text)
    return world


def test_a_run_takes_sphere_from_the_file_unless_flags_say_otherwise(world: TinyRun) -> None:
    config = world.config(hparams_fname="peer.yaml")
    assert (beta_hse_of(config), alpha_of(config)) == (0.4, 0.25)
    assert folder_of(config).name.endswith("_2_0.4_0.25")
    for beta_hse in (0.5, 0.0):  # even where it is what would be taken without a file
        parsed = edit.parser().parse_args(
            [*flags({**world.places, "hparams_fname": "peer.yaml"}), f"--beta_hse={beta_hse}", "--alpha=1"]
        )
        assert (beta_hse_of(config_of(parsed)), alpha_of(config_of(parsed))) == (beta_hse, 1.0)
    own = world.config()
    assert (beta_hse_of(own), alpha_of(own)) == (0.5, 0.5)
    assert alpha_of(replace(own, alg_name="MEMIT")) == 0.8


def test_a_run_and_its_plan_with_another_projects_file(world: TinyRun) -> None:
    config = world.config(hparams_fname="peer.yaml", dataset_size_limit=2)
    assert plan_run(config).items
    run = execute(config)
    assert (run.editor.alpha, run.folder) == (0.25, folder_of(config))
    kept = json.loads((run.folder / "run.json").read_text())
    assert (kept["beta_hse"], kept["alpha"]) == (0.4, 0.25)
    assert "--hparams_fname=peer.yaml" in kept["command"]
