"""Asking a run, or a model that was exported: what is said before and after its edits.

A run's model is loaded once and put into its states. A model of its own (a folder that transformers loads, a .gguf
file) is asked beside the one that it was made from, where that is named. Knows checkpoints, models and prompt files;
asking itself is `sphere.answers`'s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import metadata_load
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from yaml import YAMLError

from sphere.answers import (
    EDITED,
    UNEDITED,
    Answer,
    Asked,
    AskOptions,
    Question,
    answers,
    ask_states,
    side_by_side,
)
from sphere.checkpoints import USER_TURN, Checkpoint, list_checkpoints, read_config, read_weights
from sphere.data.facts import read_facts
from sphere.data.tables import FORMS
from sphere.errors import SphereError, first_line
from sphere.evaluation.run_model import ModelOptions, load_run_model, model_of
from sphere.evaluation.states import RunStates
from sphere.files import read_json
from sphere.models import load_model
from sphere.values.chat_template import user_turn
from sphere.weights import EditedWeights

ADAPTER_NAME = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # either of them


@dataclass
class _Voice:
    """A model, and how it is asked."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    turn: str

    def answers(self, questions: Sequence[Question], options: AskOptions | None) -> list[Answer]:
        return answers(self.model, self.tokenizer, questions, options, self.turn)


@dataclass
class EditedSource:
    """Whatever can be asked before and after its edits.

    Attributes:
        states: label -> weights, of a run's model; empty where the states are models of their own.
        others: label -> model of its own.
    """

    voice: _Voice
    weights: EditedWeights | None = None
    states: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    others: dict[str, _Voice] = field(default_factory=dict)

    def ask(self, questions: Sequence[Question], options: AskOptions | None = None) -> list[Asked]:
        """The answers of each state to each question.

        Raises:
            SphereError: a prompt that is longer than the model's positions.
        """
        if self.weights is not None:
            voice = self.voice
            return ask_states(
                voice.model, voice.tokenizer, self.weights, self.states, questions, options, voice.turn
            )
        found = {label: voice.answers(questions, options) for label, voice in self.others.items()}
        return side_by_side(questions, found)


def open_source(path: str | Path, options: ModelOptions, checkpoint: int | None = None) -> EditedSource:
    """A run's folder, a model's folder, a LoRA adapter's folder or a .gguf file, ready to be asked.

    Args:
        checkpoint: number of edits of the run's state; None: the last one.

    Raises:
        SphereError: nothing of the kind at `path`, no such checkpoint, another model than the run's or one that the
            adapter does not fit, or files that cannot be read.
    """
    path = Path(path)
    whole = path.suffix == ".gguf" or (path / "config.json").exists()
    if whole or (path / ADAPTER_NAME).exists():
        if checkpoint is not None:
            raise SphereError(
                f"{path} is a model and has no checkpoints: leave checkpoint out.", argument="checkpoint"
            )
        return _exported(path, options) if whole else _adapter(path, options)
    return RunSources(options).open(path, checkpoint)


class RunSources:
    """Opens runs one after the other; the model that several of them share is loaded once."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self._loaded: tuple[tuple[str, str], Any, PreTrainedTokenizerBase] | None = None

    def open(
        self, folder: str | Path, checkpoint: int | None = None, label: str | None = None
    ) -> EditedSource:
        """A run, ready to be asked; see `open_source`.

        Args:
            label: what the edited state is called; None: "edited".
        """
        folder = Path(folder)
        chosen, config = _chosen(folder, checkpoint), read_config(folder)
        model, tokenizer = self._load(folder, config)
        RunStates(model, tokenizer, folder)  # refuses another model
        saved = read_weights(chosen.path)
        weights = EditedWeights(model, list(saved))
        states: dict[str, Mapping[str, Tensor]] = {
            UNEDITED: weights.snapshot("cpu"),
            label or EDITED: saved,
        }
        turn = config.get(USER_TURN) or user_turn(tokenizer, self.options.chat_template)
        return EditedSource(_Voice(model, tokenizer, turn), weights, states)

    def _load(self, folder: Path, config: Mapping[str, Any]) -> tuple[Any, PreTrainedTokenizerBase]:
        key = model_of(folder, config, self.options)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before the next one comes
            self._loaded = key, *load_run_model(folder, config, self.options)
        return self._loaded[1:]


def _chosen(folder: Path, n_edits: int | None) -> Checkpoint:
    """The checkpoint with so many edits; by default the last one."""
    checkpoints = list_checkpoints(folder)
    for one in checkpoints:
        if one.n_edits == n_edits or (n_edits is None and one is checkpoints[-1]):
            return one
    known = ", ".join(str(one.n_edits) for one in checkpoints)
    raise SphereError(
        f"{folder} has no checkpoint after {n_edits} edits, but after {known}.", argument="checkpoint"
    )


def _exported(path: Path, options: ModelOptions) -> EditedSource:
    """A model of its own, beside the one that it was made from."""
    model, tokenizer = load_model(str(path), options.device, options.dtype, options.device_map)
    turn = user_turn(tokenizer, options.chat_template)
    edited = _Voice(model, tokenizer, turn)
    base = options.model_name or _base_model(path)
    if base is None:
        return EditedSource(edited, others={EDITED: edited})
    dtype = str(model.dtype).removeprefix("torch.")
    unedited, own = load_model(base, options.device, dtype, options.device_map)
    return EditedSource(edited, others={UNEDITED: _Voice(unedited, own, turn), EDITED: edited})


def _adapter(path: Path, options: ModelOptions) -> EditedSource:
    """A LoRA adapter's model, without and with it."""
    if importlib.util.find_spec("peft") is None:
        raise SphereError(
            f"{path} is an adapter, which takes the package peft to be read: install it, or ask the run."
        )
    base = options.model_name or _adapted_model(path)
    if not any((path / name).is_file() for name in ADAPTER_WEIGHTS):
        raise SphereError(
            f"The adapter {path} has no weights ({' or '.join(ADAPTER_WEIGHTS)}): get its files anew."
        )
    model, tokenizer = load_model(base, options.device, options.dtype, options.device_map)
    wrapped = _wrapped(model, base, path)
    layers: Iterable[tuple[str, Any]] = wrapped.base_model.model.named_modules()
    changed = {
        f"{name}.weight": layer.get_base_layer().weight
        for name, layer in layers
        if hasattr(layer, "get_base_layer")  # what peft has put around a module
    }
    original = {name: weight.detach().to("cpu", copy=True) for name, weight in changed.items()}
    merged: Any = wrapped.merge_and_unload()
    weights = EditedWeights(merged, list(original))
    states: dict[str, Mapping[str, Tensor]] = {UNEDITED: original, EDITED: weights.snapshot("cpu")}
    turn = user_turn(tokenizer, options.chat_template)
    return EditedSource(_Voice(merged, tokenizer, turn), weights, states)


def _adapted_model(path: Path) -> str:
    """The model that an adapter says it was made for."""
    config = read_json(path / ADAPTER_NAME, "adapter")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise SphereError(f"The adapter {path} does not name its model: name it.", argument="model_name")
    return base


def _wrapped(model: Any, base: str, path: Path) -> Any:
    """The model `base` with an adapter around its modules, as peft makes it."""
    from peft import PeftModel  # within the function: peft is an extra

    try:
        return PeftModel.from_pretrained(model, str(path))
    except (EOFError, OSError, SafetensorError, UnpicklingError) as error:
        raise SphereError(
            f"The weights of the adapter {path} cannot be read ({first_line(error)}): get its files anew."
        ) from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SphereError(
            f"The adapter {path} cannot be put on the model '{base}' ({first_line(error)}): name the model that it "
            "was made for, or get the adapter's files anew.",
            argument="model_name",
        ) from error


def _base_model(path: Path) -> str | None:
    """The model that a folder's model card says it was made from; None where no card can be read that says so."""
    try:
        base = (metadata_load(path / "README.md") or {}).get("base_model")
    except (OSError, ValueError, YAMLError):
        return None
    first = base[0] if isinstance(base, list) and base else base
    return first if isinstance(first, str) and first else None


def compare_runs(
    folders: Sequence[str | Path],
    questions: Sequence[Question],
    options: ModelOptions,
    asking: AskOptions | None = None,
) -> list[Asked]:
    """The answers of several runs' last states, and of the model or models that they began with.

    Returns:
        By prompt: label -> answer. A run's label is what tells its path from the others'; the unedited model has one
        column where all runs began with it and put prompts into the same user's turn, else one for each run.

    Raises:
        SphereError: fewer than two runs, or one of them cannot be asked.
    """
    if len(folders) < 2:
        raise SphereError("Comparing takes at least two runs: give their folders.", argument="runs")
    for folder in folders:
        list_checkpoints(folder)  # a wrong folder is reported before anything is loaded
    labels, sources = short_labels(folders), RunSources(options)
    unedited: dict[tuple[Any, ...], list[Answer]] = {}  # by what decides them: name, fingerprint, user's turn
    edited: dict[str, tuple[tuple[Any, ...], list[Answer]]] = {}
    for folder, label in zip(folders, labels, strict=True):
        config, source = read_config(folder), sources.open(folder, label=label)
        key = options.model_name or config.get("model_name"), config.get("model"), source.voice.turn
        if key in unedited:
            del source.states[UNEDITED]
        asked = source.ask(questions, asking)
        if key not in unedited:
            unedited[key] = [one.answers[UNEDITED] for one in asked]
        edited[label] = key, [one.answers[label] for one in asked]
    if len(unedited) == 1:
        own = {label: said for label, (_, said) in edited.items()}
        return side_by_side(questions, {UNEDITED: next(iter(unedited.values())), **own})
    found: dict[str, list[Answer]] = {}
    for label, (key, said) in edited.items():
        found |= {f"{UNEDITED} {label}": unedited[key], label: said}
    return side_by_side(questions, found)


def short_labels(folders: Sequence[str | Path]) -> list[str]:
    """Paths without the folders that all of them begin and end with."""
    parts = [Path(folder).resolve().parts for folder in folders]
    while min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    labels = ["/".join(p) for p in parts]
    return labels if len(set(labels)) == len(labels) else [str(folder) for folder in folders]


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a file: a table of facts (.csv, .tsv, .json, .jsonl), or a text with a prompt on each line.

    A fact is asked with its prompt and, as targets, its new and its true answer.

    Raises:
        SphereError: no such file, none of UTF-8, no prompt in it, or a row that is no fact.
    """
    path = Path(path)
    if path.suffix.lower() in FORMS:
        facts = read_facts(path)
        if facts.bad:
            raise SphereError(
                f"Row {facts.bad[0].number} of {path} is no fact: {facts.bad[0].reason}", argument="prompts"
            )
        return [
            Question(r.text, tuple(filter(None, (r.target_new, r.target_true))))
            for r in (record.request for record in facts.records)
        ]
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SphereError(f"Cannot read the prompts {path}: {error}.", argument="prompts") from error
    prompts = [Question(line) for line in lines if line.strip()]
    if not prompts:
        raise SphereError(f"{path} holds no prompts: write one on each line.", argument="prompts")
    return prompts
