"""A whole run in small: a random model on disk, its tokenizer, hyperparameter files and a dataset."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA_MODULES, tiny_llama, tiny_values
from transformers import PreTrainedTokenizerBase

import sphere.commands.common
from sphere.baselines.mend.networks import MendEditor
from sphere.methods import get_method
from sphere.methods.registry import BUILT_IN
from sphere.runs.run import RunConfig

LABEL = "tiny"
METHODS = tuple(BUILT_IN)
OWN = {  # hyperparameters beside those of the MEMIT family
    "AlphaEdit": {"nullspace_threshold": 0.5, "L2": 1.0},
    "BetaEdit": {"nullspace_threshold": 0.5, "L2": 1.0, "L1": 1.0, "tau": 4},
    "ENCORE": {"mom2_ridge": 1.0, "z_stop": 0},
    "FT": {"num_steps": 3, "lr": 1e-2},
    "LyapLock": {"preservation_bound": 2.0},
    "MEND": {"rank": 4, "edit_lr": 0.1},
    "NAS": {"nullspace_threshold": 0.5, "L2": 1.0},
    "ROME": {"layers": [1]},
    "UltraEdit": {"lr": 1e-2},
}


def method_values(method: str, **changes: Any) -> dict[str, Any]:
    """The JSON content of a method's hyperparameter file for the tiny model."""
    values = tiny_values(LLAMA_MODULES) | OWN.get(method, {}) | {"v_num_grad_steps": 3} | changes
    names = {field.name for field in dataclasses.fields(get_method(method).hparams_class)}
    return {key: value for key, value in values.items() if key in names or key in changes}


def records(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up facts in the CounterFact schema."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    result = []
    for case in range(n):
        subject = "".join(generator.choices(letters, k=5)).capitalize()
        result.append(
            {
                "case_id": case,
                "requested_rewrite": {
                    "prompt": "{} is in",
                    "subject": subject,
                    "target_new": {"str": generator.choice(["Rome", "Oslo", "Bonn"])},
                    "target_true": {"str": "Paris"},
                },
                "paraphrase_prompts": [f"Where is {subject}? In"],
                "neighborhood_prompts": ["Ann is in"],
                "generation_prompts": [f"{subject} is"],
            }
        )
    return result


def space_sayer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A random Llama that continues a text by a space or by its first token, after the sign of one feature."""
    model, space = tiny_llama(), tokenizer.convert_tokens_to_ids("Ġ")
    model.lm_head.weight.zero_()
    model.lm_head.weight[space, 0], model.lm_head.weight[1, 0] = 1.0, -1.0
    return model


class TinyRun:
    """The folder of a tiny world, and runs in it.

    Attributes:
        folder: holds model, hparams, data and stats; written unless there is no tokenizer to write.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, n_records: int = 8
    ) -> None:
        self.folder = folder
        if tokenizer is None:
            return
        tiny_llama().save_pretrained(folder / LABEL)
        tokenizer.save_pretrained(folder / LABEL)
        for method in METHODS:
            self.write_hparams(method)
        self.write_records(records(n_records))
        editor = MendEditor(dict.fromkeys((1, 2), (32, 48)), rank=4, edit_lr=0.1)
        (folder / "stats" / LABEL).mkdir(parents=True)
        editor.save(folder / "stats" / LABEL / "mend.safetensors", {})

    def copy(self, folder: Path) -> TinyRun:
        """The same in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return TinyRun(folder)

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / LABEL

    def write_hparams(self, method: str, **changes: Any) -> Path:
        """Write a method's hyperparameter file, with changes; None removes a key."""
        values = {k: v for k, v in method_values(method, **changes).items() if v is not None}
        path = self.folder / "hparams" / method / f"{LABEL}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        return path

    def write_records(self, content: Any) -> Path:
        """Write the dataset ("starter")."""
        path = self.folder / "data" / "starter.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    @property
    def places(self) -> dict[str, str]:
        """Settings that say where things are."""
        return {
            "model_name": str(self.folder / LABEL),
            "data_dir": str(self.folder / "data"),
            "hparams_dir": str(self.folder / "hparams"),
            "stats_dir": str(self.folder / "stats"),
            "cache_dir": str(self.folder / "cache"),
        }

    def config(self, output: str = "runs", **settings: Any) -> RunConfig:
        """Settings of a run: batches of 2, every checkpoint saved."""
        defaults = {"num_edits": 2, "checkpoints": "all", "log_energy_every": 0, "device": "cpu"}
        return RunConfig(**{**self.places, "output_dir": str(self.folder / output), **defaults, **settings})

    def flags(self, output: str = "runs", **settings: Any) -> list[str]:
        """The same as flags of `experiments.evaluate`; True is a flag without a value, None leaves it out."""
        values = {**self.places, "output_dir": str(self.folder / output), "num_edits": 2, "device": "cpu"}
        return flags({**values, **settings})


def flags(settings: dict[str, Any]) -> list[str]:
    """{"a": 1, "b": True} -> ["--a=1", "--b"]."""
    given = {k: v for k, v in settings.items() if v is not None and v is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]


def command(
    main: Callable[[list[str] | None], int | None],
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str, str]:
    """What a command line does, in this process: its exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    monkeypatch.setattr(
        sphere.commands.common, "set_up_logging", lambda: None
    )  # it would take pytest's handlers away
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sphere.commands.common.run_cli(main)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, *capsys.readouterr()


def contents(folder: Path, pattern: str = "edit_*.safetensors") -> dict[str, bytes]:
    """Name -> bytes of a run's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}
