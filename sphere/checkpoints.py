"""What a run leaves on disk: one folder with its configuration, one safetensors file per checkpoint.

    Edited_Weight/<alg>/<model>/<dataset>_weight_data_batch_<num_edits>_<beta_hse>_<alpha>/
        run.json                 full configuration of the run
        batches.jsonl            what each batch did to the edited weights
        edit_0.safetensors       the original weights of the edited layers
        edit_<n>.safetensors     the same weights after n edits, or factors of their change
        resume.safetensors       the last finished batch, to go on from: what changes with every batch
        resume_<n>.safetensors   what stays as it was written after n edits (the keys of that batch, or their matrix)

Knows nothing of models: tensors are named and oriented as the model stores them. Nothing here executes code from
a file: `.pth` files of the published form ({"weight": {name: tensor}}) are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sphere.errors import SphereError, first_line
from sphere.factors import Factors
from sphere.files import atomic_path, read_json, write_json
from sphere.renamed import by_new_names
from sphere.strength import OrAuto, in_words

CONFIG_NAME = "run.json"
LOG_NAME = "batches.jsonl"
ORIGINAL_NAME = "edit_0.safetensors"
LEFT, RIGHT = "/left", "/right"  # end the names of factors of a weight's change
RESUME_NAME = "resume.safetensors"
RESUME_PART = re.compile(r"resume_\d+\.safetensors")
# In run.json while a run begins: files of the run before it, which go (`sphere.runs.folder`).
USER_TURN = (
    "user_turn"  # key of run.json: what the run's prompts were put into, where it used a chat template
)
REPLACED = "replaced"
CHECKPOINT = re.compile(r"edit_(\d+)(\.safetensors|\.pth)?")
MOST_PARTS = 32  # then all but the largest are written anew as one


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: its file and the number of edits written up to it."""

    path: Path
    n_edits: int


def run_folder(
    output_dir: str | Path,
    alg: str,
    model: str,
    dataset: str,
    num_edits: int,
    beta_hse: OrAuto,
    alpha: OrAuto,
) -> Path:
    """The folder of a run, e.g. Edited_Weight/AlphaEdit/Qwen2.5-7B/mcf_weight_data_batch_100_0.5_0.5."""
    numbers = f"{num_edits}_{in_words(beta_hse)}_{in_words(alpha)}"
    return Path(output_dir) / alg / model / f"{dataset}_weight_data_batch_{numbers}"


def write_checkpoint(
    folder: str | Path,
    n_edits: int,
    weights: Mapping[str, Tensor],
    name: str | None = None,
    undone: Collection[int] = (),
) -> Path:
    """Save weights (in the model's own orientation) as `edit_<n_edits>.safetensors` (or `name`), atomically.

    Args:
        undone: case_ids of the edits that are not in these weights any more.
    """
    path = Path(folder) / (name or f"edit_{n_edits}.safetensors")
    # One entry: several would be written in any order, and equal runs should be equal files.
    metadata = {"n_edits": str(n_edits)}
    if undone:
        metadata = {"state": json.dumps({"n_edits": n_edits, "undone": sorted(undone)})}
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary, metadata=metadata)
    return path


def undone_in(path: str | Path) -> frozenset[int]:
    """The case_ids of the edits that a checkpoint is without, since they were undone.

    Raises:
        SphereError: the file is damaged.
    """
    if Path(path).suffix != ".safetensors":  # a published one
        return frozenset()
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(json.loads((file.metadata() or {}).get("state", "{}")).get("undone", ()))
    except (SafetensorError, OSError, ValueError) as error:
        raise SphereError(
            f"Cannot read the checkpoint {path} ({error}): write it again or remove it."
        ) from error


def list_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """All `edit_<n>` files of a run, by number of edits.

    Raises:
        SphereError: no such folder, or no checkpoint in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SphereError(
            f"No folder {folder}: give a folder that `sphere edit` wrote.", argument="weight_folder"
        )
    if REPLACED in read_config(folder):
        raise SphereError(
            f"The run in {folder} was broken off as it began and has no checkpoints yet: start it again with "
            "continue_from_run.",
            argument="continue_from_run",
        )
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = CHECKPOINT.fullmatch(path.name)
        if match and path.is_file():
            found.setdefault(int(match[1]), path)
            if path.suffix == ".safetensors":
                found[int(match[1])] = path
    if not found:
        raise SphereError(
            f"No checkpoints (edit_<n>.safetensors or .pth) in {folder}: is this a run's folder?"
        )
    return [Checkpoint(path, n) for n, path in sorted(found.items())]


def chosen_checkpoints(checkpoints: Sequence[Checkpoint], wanted: str) -> list[int]:
    """The numbers of edits that "last", or a list such as "0,100,last", stands for; 0: the unedited model.

    Raises:
        SphereError: something else, or a number at which there is no checkpoint.
    """
    there = [0, *(checkpoint.n_edits for checkpoint in checkpoints if checkpoint.n_edits)]
    named = [word.strip() for word in wanted.split(",")]
    numbers = [str(there[-1]) if word == "last" else word for word in named]
    if strays := [n for n in numbers if n not in map(str, there)]:
        raise SphereError(
            f"There is no checkpoint '{strays[0]}': name some of {', '.join(map(str, there))}, or last.",
            argument="only_checkpoints",
        )
    return [int(number) for number in numbers]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint without executing anything in it; tensors as the model stores them, on the CPU.

    Raises:
        SphereError: missing, damaged, not a checkpoint, without the original weights that it holds changes of, or with
            values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise SphereError(f"No checkpoint {path}: give the folder of a run.", argument="weight_folder")
    try:
        safetensors = path.suffix == ".safetensors"
        content = load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        unsafe = str(error).startswith("Weights only load failed")
        reason = "it holds more than tensors, which could run code" if unsafe else first_line(error)
        raise SphereError(
            f"Cannot read the checkpoint {path} safely ({reason}): write it again or remove it."
        ) from error
    weights = content.get("weight", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise SphereError(
            f'The checkpoint {path} does not hold {{"weight": {{name: tensor}}}}: not a file of this kind.'
        )
    weights = _with_changes(weights, path)
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise SphereError(
                f"'{name}' in the checkpoint {path} is not finite: write it again or remove it."
            )
    return weights


def _with_changes(content: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of a file, where it holds factors of their change: W_0 + L R^T, rounded to the dtype of W_0."""
    changed = [key.removesuffix(LEFT) for key in content if key.endswith(LEFT)]
    if not changed:
        return content
    places = (
        path.parent / ORIGINAL_NAME,
        path.parent.parent / ORIGINAL_NAME,
    )  # of a state that is kept beside
    found = next((place for place in places if place.is_file()), None)
    original = read_weights(found) if found else {}
    weights = {key: tensor for key, tensor in content.items() if not key.endswith((LEFT, RIGHT))}
    for name in changed:
        change = Factors(content[name + LEFT], content[name + RIGHT]).delta()
        if name not in original or original[name].shape != change.shape:
            raise SphereError(
                f"The checkpoint {path} holds the change of '{name}', which is added to that of {places[0]}: put the "
                "run's own one there."
            )
        weights[name] = (original[name].double() + change).to(original[name].dtype)
    return weights


def write_config(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Save the run's configuration beside its checkpoints."""
    write_json(Path(folder) / CONFIG_NAME, dict(config))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of the run that wrote `folder`; {} where there is none (published .pth runs)."""
    path = Path(folder) / CONFIG_NAME
    config: Any = read_json(path, "run configuration") if path.exists() else {}
    if not isinstance(config, dict):
        raise SphereError(f"The run configuration {path} is not a JSON object: no run of ours wrote it.")
    return by_new_names(config)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The batches of an editing log, [] where there is none; a last line that a kill has cut is left out.

    Raises:
        SphereError: any other line that is no batch.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    batches = []
    for number, line in enumerate(lines, 1):
        try:
            batch = json.loads(line)
            batches.append({"n_edits": int(batch["n_edits"]), "layers": dict(batch["layers"]), **batch})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise SphereError(
                    f"Line {number} of {path} is no batch of an editing log: correct or remove it."
                ) from error
    return batches


def logged_energy_changes(batches: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Number of edits -> weight name -> relative change of the energy, of the batches that were measured."""
    changes = {}
    for batch in batches:
        found = {n: f["energy_change"] for n, f in batch["layers"].items() if "energy_change" in f}
        if found:
            changes[batch["n_edits"]] = found
    return changes


def write_resume(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    append_only: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> int:
    """Replace the run's resume point; a kill at any moment leaves the old one or the new one whole.

    Only what is new is written: at 5000 edits of a 7B model the weights under edit are 1.4 GB in float32, the keys of
    all earlier batches another 1.9 GB. At no moment does the disk hold more than the old point and the new one.

    Args:
        tensors: change with every batch.
        append_only: never change under their name: those of the point before are left where they are, those that are
            no longer named are removed.
        state: small and JSON-able; "n_edits" names the file of what is new.

    Returns:
        Bytes of all of its files.
    """
    folder = Path(folder)
    before = _resume_parts(folder)
    _remove_parts(folder, before)  # what a kill has left
    parts = {part: names for part, names in before.items() if append_only.keys() >= set(names)}
    if len(parts) >= MOST_PARTS:
        largest = max(parts, key=lambda part: ((folder / part).stat().st_size, part))
        parts = {largest: parts[largest]}
    known = {name for names in parts.values() for name in names}
    new = {name: tensor for name, tensor in append_only.items() if name not in known}
    if new:
        part = f"resume_{state['n_edits']}.safetensors"
        with atomic_path(folder / part) as temporary:
            save_file(_plain(new), temporary)
        parts[part] = sorted(new)
    with atomic_path(folder / RESUME_NAME) as temporary:  # last: it names the others
        # One entry: several would be written in any order, and equal runs should be equal files.
        content = json.dumps({"state": state, "parts": parts})
        save_file(_plain(tensors), temporary, metadata={"resume": content})
    _remove_parts(folder, parts)
    return sum((folder / name).stat().st_size for name in (RESUME_NAME, *parts))


def read_resume(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """The resume point of a run as (tensors, append_only, state), or None where it has none.

    Raises:
        SphereError: one of its files is damaged or gone.
    """
    path = Path(folder) / RESUME_NAME
    if not path.exists():
        return None
    append_only: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["resume"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        for part, names in content["parts"].items():
            path = Path(folder) / part
            with safe_open(path, framework="pt") as file:
                append_only |= {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise SphereError(
            f"The resume point {path} is damaged ({error}): overwrite the run.", argument="overwrite"
        ) from error
    return tensors, append_only, content["state"]


def resume_state(folder: str | Path) -> dict[str, Any]:
    """The small part of a run's resume point ("n_edits", ...), without its tensors; {} where it has none.

    Raises:
        SphereError: the file is damaged.
    """
    path = Path(folder) / RESUME_NAME
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["resume"])["state"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SphereError(
            f"The resume point {path} is damaged ({error}): overwrite the run.", argument="overwrite"
        ) from error


def _resume_parts(folder: Path) -> dict[str, list[str]]:
    """File -> names of the append_only tensors in it, as the resume point says."""
    path = folder / RESUME_NAME
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["resume"])["parts"]


def _remove_parts(folder: Path, kept: Collection[str]) -> None:
    """Remove the parts that no resume point names."""
    for path in folder.iterdir():
        if RESUME_PART.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
