"""The settings of a run, and the command that makes it again; what they come to is in `sphere.runs.resolve`.

Each field of `RunConfig` says in one place what it is called, its type, default, help, group and choices; the flags of
the commands, the keys of a sweep and run.json are made from that. Knows names and paths. Loads no model, writes
nothing, and is imported without PyTorch.
"""

from __future__ import annotations

import platform
import shlex
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from sphere.data.records import FILES
from sphere.embedded import DEFAULT_MODEL, EMBEDDED
from sphere.errors import SphereError
from sphere.renamed import RENAMED, by_new_names
from sphere.runs.guard_limits import LIMITS, parse_limits
from sphere.strength import ALPHA_BUDGET, check_budget

if TYPE_CHECKING:
    from sphere.forward.passes import PassOptions

BETA_HSE = 0.5  # the paper's
OWN_FACTS = "facts"  # the dataset's name where `facts` gives it
PROGRAM = ("python", "-m", "sphere")  # in a checkout and where the package is installed


def _setting(default: Any, group: str, help: str, **more: Any) -> Any:
    """A field of `RunConfig`: its default, the group of flags that it stands in, and what it means.

    Args:
        more: `choices` (the values that it may have), `at_least` (its smallest number).
    """
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is decided by and what it logs."""

    alg_name: str = _setting("AlphaEdit", "editing", "the method; `sphere methods` shows them all")
    model_name: str = _setting(
        DEFAULT_MODEL,
        "model",
        f"an embedded model ({', '.join(EMBEDDED)}), a folder, a .gguf file or a hub id",
    )
    hparams_fname: str | None = _setting(
        None, "editing", "file in <hparams_dir>/<alg_name>/ (default: the model's name + .json)"
    )
    ds_name: str = _setting(
        "starter",
        "data",
        "starter or facts_zh (Chinese), both embedded, cf (CounterFact), mcf (the part of it that MEMIT uses), zsre, "
        "another benchmark, or facts: your own",
        choices=(*FILES, OWN_FACTS),
    )
    facts: str | None = _setting(
        None,
        "data",
        "your own facts: a .csv, .tsv, .json or .jsonl file, or - for standard input; `sphere check` shows how it is "
        "read",
    )
    subjects: str | None = _setting(
        None, "data", "a file with a subject on each line, for facts whose rows name none"
    )
    on_bad_record: str = _setting(
        "stop",
        "data",
        "whether rows of --facts that cannot be used stop the run or are skipped",
        choices=("stop", "skip"),
    )
    dataset_size_limit: int | None = _setting(40, "data", "use only the first so many records", at_least=1)
    num_edits: int = _setting(20, "editing", "edits per batch", at_least=1)
    chat_template: bool = _setting(
        False,
        "editing",
        "put prompts, with their contexts, into the user's turn of the tokenizer's chat template, in editing and in "
        "scoring",
    )
    beta_hse: float | Literal["auto"] | None = _setting(
        None,
        "editing",
        "SPHERE: cumulative ratio that decides how many directions are principal, or auto: those above the noise; 0 "
        f"switches it off (default: what the hyperparameter file says, else {BETA_HSE:g})",
    )
    alpha: float | Literal["auto"] | None = _setting(
        None,
        "editing",
        "SPHERE: suppression strength, or auto: the least that keeps to --alpha_budget (default: what the "
        "hyperparameter file says, else the paper's, 0.5 for AlphaEdit and 0.8 for the others)",
    )
    alpha_budget: float | None = _setting(
        None,
        "editing",
        "SPHERE: of the squared norm in a weight's principal directions, the fraction that edits may put there with "
        f"--alpha auto (default: what the hyperparameter file says, else {ALPHA_BUDGET:g})",
    )
    rules: str | None = _setting(
        None,
        "editing",
        "a chain of update rules in place of the method's own, e.g. rect,sphere; there are rect, prune, "
        "sphere, revive and random",
    )
    directions: str = _setting(
        "current",
        "editing",
        "SPHERE: principal directions of the current weight, as published, or of the original one",
        choices=("current", "original"),
    )
    project: str = _setting(
        "within",
        "editing",
        "whether rules see each update before the next layer is solved, as published, or all once all layers are "
        "solved, as in EasyEdit's SPHERE",
        choices=("within", "after"),
    )
    revive_tau: float = _setting(
        0.1, "editing", "REVIVE: fraction of the singular values' sum whose directions updates keep out of"
    )
    seed: int = _setting(0, "editing", "of everything that is sampled")
    shuffle: bool = _setting(
        False,
        "data",
        "edit the first dataset_size_limit records in another order, which the seed decides (default: the file's)",
    )
    device: str = _setting("auto", "model", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    dtype: str = _setting(
        "auto",
        "model",
        "auto (float32 on CPU, the checkpoint's own on a GPU), float32, bfloat16, float16 or float64",
    )
    device_map: str | None = _setting(
        None, "model", "spread the layers over devices, e.g. auto; overrides --device"
    )
    data_dir: str = _setting(
        "data",
        "data",
        "folder with the published files; cf, mcf and zsre are downloaded into it when missing",
    )
    hparams_dir: str = _setting("hparams", "editing", "where hyperparameter files are")
    stats_dir: str = _setting("data/stats", "output", "where second moments are kept for later runs")
    stats_from: str | None = _setting(
        None,
        "data",
        "a .npz file or a folder of second moments that ROME, MEMIT or AlphaEdit have computed, in place of computing "
        "them (default: those that lie in these projects' places in --stats_dir)",
    )
    cache_dir: str = _setting("data/cache", "output", "where --use_cache keeps target values")
    output_dir: str = _setting("Edited_Weight", "output", "where runs are written")
    checkpoints: str = _setting(
        "ends",
        "output",
        "which weights to save besides edit_0: ends (first and last batch), all, or numbers of edits: 100,300",
    )
    save: str = _setting(
        "weights",
        "output",
        "what checkpoints hold: weights, or factors of their change where these are smaller",
        choices=("weights", "factors"),
    )
    ledger: str = _setting(
        "auto",
        "output",
        "which updates are kept so that edits can be undone: auto (factors; whole updates, which some rules need, "
        "where those of a run take at most 1 GiB), all, or none",
        choices=("auto", "all", "none"),
    )
    log_energy_every: int = _setting(
        1,
        "output",
        "log hyperspherical energy, principal share and conditioning of the edited weights after every so-many-th "
        "batch; 0: never",
    )
    tensorboard: bool = _setting(False, "output", "also log each batch's metrics as TensorBoard events")
    batch_tokens: int | None = _setting(
        None,
        "machine",
        "tokens in one forward pass, of editing and of scoring; less needs less memory (default: what suits the device "
        "and the kind of pass)",
        at_least=1,
    )
    z_matmul_dtype: str = _setting(
        "model",
        "machine",
        "the type in which the layers above z multiply while z is sought; its state stays in float32. bfloat16 is "
        "faster for a float32 model where the processor knows it",
        choices=("model", "bfloat16"),
    )
    on_breakdown: str = _setting(
        "stop",
        "editing",
        "whether an absurdly large update stops the run or is written, with a warning; what is not finite always stops "
        "it",
        choices=("stop", "continue"),
    )
    guard: bool = _setting(
        False, "editing", "look at the model after each batch, and stop at the last good one before it breaks"
    )
    guard_limits: str | None = _setting(
        None,
        "editing",
        "limits of --guard that are not the defaults, e.g. perplexity=2,energy=inf, or none; defaults: "
        + ", ".join(f"{name}={limit.default:g}" for name, limit in LIMITS.items()),
    )
    conserve_memory: bool = _setting(
        False, "machine", "keep second moments, projectors and original weights off the GPU"
    )
    use_cache: bool = _setting(False, "machine", "keep target values z on disk for methods that share them")
    continue_from_run: bool = _setting(
        False, "output", "go on with the run of these settings where it stopped"
    )
    overwrite: bool = _setting(False, "output", "replace a run that is already there")

    def __post_init__(self) -> None:
        if self.facts is not None and self.ds_name == RunConfig.ds_name:
            object.__setattr__(self, "ds_name", OWN_FACTS)  # `facts` alone says what the dataset is

    @property
    def passes(self) -> PassOptions:
        """How this run's forward passes are cut."""
        from sphere.forward.matmul_dtype import MATMUL_DTYPES
        from sphere.forward.passes import PassOptions

        return PassOptions(
            batch_tokens=self.batch_tokens,
            conserve_memory=self.conserve_memory,
            z_matmul_dtype=MATMUL_DTYPES[self.z_matmul_dtype],
        )

    def check(self) -> None:
        """Refuse what no run can be made of.

        Raises:
            SphereError: a setting out of its range, or settings that contradict one another.
        """
        for setting in settings().values():
            value, name = getattr(self, setting.name), setting.name
            if setting.words and value is not None:
                setting.read(value)
            if setting.choices and value not in setting.choices:
                choices = ", ".join(setting.choices)
                raise SphereError(f"{name} is one of {choices}, got '{value}'.", argument=name)
            if setting.at_least is not None and value is not None and value < setting.at_least:
                raise SphereError(f"{name} must be at least {setting.at_least}, got {value}.", argument=name)
        if not 0 <= self.seed < 2**63:
            raise SphereError(
                f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed}.", argument="seed"
            )
        if (self.ds_name == OWN_FACTS) != (self.facts is not None):
            raise SphereError(
                f"The dataset '{OWN_FACTS}' is the table that facts names: give that table, and no other dataset.",
                argument=("ds_name", "facts"),
            )
        if self.alpha_budget is not None:
            check_budget(self.alpha_budget)
        parse_limits(self.guard_limits)
        if self.guard_limits and not self.guard:
            raise SphereError(
                "guard_limits are those of the guard: ask for it, too.", argument=("guard", "guard_limits")
            )
        if self.continue_from_run and self.overwrite:
            raise SphereError(
                "A run cannot be both continued and replaced: ask for one of them.",
                argument=("continue_from_run", "overwrite"),
            )


@dataclass(frozen=True)
class Setting:
    """One field of `RunConfig` as a command line, a sweep and a file know it.

    Attributes:
        kind: its type: int, float, str or bool.
        words: what it may be instead, e.g. ("auto",).
        optional: whether it may be None.
        at_least: its smallest number, where there is one.
        old_names: what it was called in earlier versions.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    group: str
    help: str
    choices: tuple[str, ...] = ()
    at_least: int | None = None
    words: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """A value of a command line or a file as one of this setting: one of its words, else of its kind.

        Raises:
            SphereError: it is neither.
        """
        if value in self.words:
            return value
        try:
            return self.kind(value)
        except (TypeError, ValueError):
            raise SphereError(f"{self.name} is {self.expected}, got {value!r}.", argument=self.name) from None

    @property
    def expected(self) -> str:
        """What `read` takes, in words: "a number or auto"."""
        kind = {int: "a whole number", float: "a number"}.get(self.kind, f"of type {self.kind.__name__}")
        return " or ".join((kind, *self.words))


@cache
def settings() -> dict[str, Setting]:
    """Name -> setting, of every field of `RunConfig`, in their order."""
    hints = typing.get_type_hints(RunConfig)
    found = {}
    for one in fields(RunConfig):
        parts = typing.get_args(hints[one.name]) or (hints[one.name],)
        words = tuple(word for part in parts for word in typing.get_args(part))  # of Literal[...]
        (kind,) = (part for part in parts if part is not NoneType and not typing.get_args(part))
        old = tuple(old for old, new in RENAMED.items() if new == one.name)
        found[one.name] = Setting(
            one.name, kind, NoneType in parts, one.default, words=words, old_names=old, **one.metadata
        )
    return found


def config_in(stored: Mapping[str, Any]) -> RunConfig:
    """The settings that a `run.json` holds."""
    return RunConfig(**{name: value for name, value in by_new_names(stored).items() if name in settings()})


def saved_at(checkpoints: str, ends: Sequence[int]) -> set[int]:
    """Numbers of edits at which weights are saved: "ends" (first and last batch), "all", or a list "100,300".

    Args:
        ends: number of edits after each batch.

    Raises:
        SphereError: something else, or a number at which no batch ends.
    """
    if checkpoints == "all":
        return set(ends)
    result = {ends[0], ends[-1]}
    if checkpoints == "ends":
        return result
    try:
        wanted = {int(part) for part in checkpoints.split(",")}
    except ValueError:
        raise SphereError(
            f"checkpoints is 'ends', 'all' or numbers of edits such as 100,300; got '{checkpoints}'.",
            argument="checkpoints",
        ) from None
    if strays := sorted(wanted - set(ends)):
        raise SphereError(
            f"checkpoints names {strays}, but batches end at {', '.join(map(str, ends[:5]))}"
            f"{', ...' if len(ends) > 5 else ''}: give multiples of num_edits.",
            argument=("checkpoints", "num_edits"),
        )
    return result | wanted


def describe(config: RunConfig, command: str | None) -> dict[str, Any]:
    """A configuration with what else there is to know of how a run was made, JSON-able."""
    import torch
    import transformers

    return {
        **asdict(config),
        "command": command or command_of(asdict(config)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def limit_by_default(facts: str | None) -> int | None:
    """`dataset_size_limit` where none is given: its default for a dataset, none for one's own facts."""
    return RunConfig.dataset_size_limit if facts is None else None


def command_of(config: Mapping[str, Any]) -> str:
    """The command that makes a run of this configuration (`run.json`, or a `RunConfig` as a dictionary) again."""
    words = [*PROGRAM, "edit"]
    values = by_new_names(config)
    skipped = {"continue_from_run", "overwrite"} | ({"ds_name"} if values.get("facts") else set())
    if values.get("dataset_size_limit") is None and "case_ids" in values:
        values["dataset_size_limit"] = len(values["case_ids"])  # the command's own default is no "all"
    defaults = {"dataset_size_limit": limit_by_default(values.get("facts"))}
    for setting in settings().values():
        value = values.get(setting.name, setting.default)
        default = defaults.get(setting.name, setting.default)
        if setting.name in skipped or value == default or value is None:
            continue
        words.append(f"--{setting.name}" if value is True else f"--{setting.name}={value}")
    return shlex.join(words)
