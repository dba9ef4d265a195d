"""One job of a sweep, wherever Hydra's launcher puts it: the keys that it may be given, and what it runs.

Knows Hydra and `sphere.runs.sweep`. The command is `sphere.commands.sweep`, the configuration sweep.yaml beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, OmegaConf

from sphere.renamed import by_new_names
from sphere.runs.config import RunConfig, limit_by_default, settings
from sphere.runs.forecast import progress_line
from sphere.runs.job import SCORING, Job
from sphere.runs.sweep import run_job

log = logging.getLogger(__name__)

ALONE = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # one job after the other
LIMIT = "dataset_size_limit"  # where it is not given, facts decide; null is all
OF_THE_COMMAND = ("dry_run", "report", "reference")  # no part of a job
DECIDED_HERE = ("output_dir", "continue_from_run", "overwrite")


def schema() -> type:
    """The keys of a sweep, those of `RunConfig` among them, as a class that OmegaConf checks overrides against."""
    keys: list[tuple[str, Any, Any]] = []
    for setting in settings().values():
        if setting.name not in DECIDED_HERE:
            kind: Any = setting.kind | None if setting.optional else setting.kind
            if setting.words:  # a number or a word: read by `Setting.read`
                kind = Any
            default = MISSING if setting.name == LIMIT else setting.default
            keys.append((setting.name, kind, dataclasses.field(default=default)))
            keys += [(old, setting.kind | None, dataclasses.field(default=None)) for old in setting.old_names]
    of_the_sweep: list[tuple[str, Any]] = [
        ("reference", str | None),
        ("sweep_dir", str),
        *((name, int) for name in SCORING),
        ("devices", list[str]),
        ("dry_run", bool),
        ("report", bool),
    ]
    keys += [(name, kind, dataclasses.field(default=MISSING)) for name, kind in of_the_sweep]
    return dataclasses.make_dataclass("Settings", keys)


ConfigStore.instance().store(name="settings", node=schema())


def job_of(config: dict[str, Any], number: int = 0) -> Job:
    """The job of one combination of values; `number` says whose turn at `devices` it is."""
    old = {name for setting in settings().values() for name in setting.old_names}
    given = {key: v for key, v in config.items() if v != MISSING and (key not in old or v is not None)}
    values = by_new_names(given)
    values.setdefault(LIMIT, limit_by_default(values.get("facts")))
    sweep_dir = values.pop("sweep_dir")
    scoring = {name: values.pop(name, default) for name, default in SCORING.items()}
    for key in OF_THE_COMMAND:
        values.pop(key, None)
    for setting in settings().values():
        if setting.words and values.get(setting.name) is not None:
            values[setting.name] = setting.read(values[setting.name])
    if devices := values.pop("devices"):
        values["device"] = devices[number % len(devices)]
    return Job(RunConfig(output_dir=str(sweep_dir), **values), **scoring)


@hydra.main(version_base=None, config_path=".", config_name="sweep")
def sweep(config: DictConfig) -> None:
    """One job, wherever Hydra's launcher puts it."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    own = HydraConfig.get()
    job = job_of({str(k): v for k, v in values.items()}, own.job.num)
    if own.launcher._target_ == ALONE:
        _run(job)
        return
    # The bars of jobs side by side would tear one another apart; what the logs say still comes through.
    with (Path(own.runtime.output_dir) / "progress.log").open("a") as bars, redirect_stderr(bars):
        _run(job)


def _run(job: Job) -> None:
    run_job(job)
    if line := progress_line(Path(job.config.output_dir)):
        log.info("%s", line)


def own_settings(overrides: list[str]) -> DictConfig:
    """The settings of the sweep itself, as the overrides or the configuration say: sweep_dir, dry_run, report, ..."""
    own = [o for o in overrides if o.partition("=")[0] in ("sweep_dir", *OF_THE_COMMAND)]
    return _compose(own)


def jobs_of(overrides: list[str]) -> list[Job]:
    """The jobs that Hydra's own sweeper will make of these overrides, in its order.

    Raises:
        HydraException: overrides that Hydra refuses.
    """
    choices: dict[str, list[str]] = {}  # the last word on a key counts, as for Hydra
    for override in OverridesParser.create().parse_overrides(overrides):
        key = str(override.get_key_element())
        if key.lstrip("+~").startswith("hydra"):
            continue
        swept = override.is_sweep_override()
        values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]
    combinations = [_compose(list(words)) for words in itertools.product(*choices.values())]
    containers: list[Any] = [OmegaConf.to_container(config, resolve=True) for config in combinations]
    return [job_of(values, number) for number, values in enumerate(containers)]


def _compose(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(Path(__file__).parent.resolve()), version_base=None):
        return hydra.compose("sweep", overrides)
