"""One job of a sweep, wherever Hydra's launcher puts it: the keys that it may be given, and what it runs.

Knows Hydra and `sphere.runs.sweep`. The command is `sphere.commands.sweep`, the configuration sweep.yaml beside it.
"""

from __future__ import annotations

import dataclasses
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from sphere.renamed import by_new_names
from sphere.runs.config import RunConfig, settings
from sphere.runs.sweep import Job, run_job

ALONE = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # one job after the other
DECIDED_HERE = ("output_dir", "continue_from_run", "overwrite")


def schema() -> type:
    """The keys of a sweep, those of `RunConfig` among them, as a class that OmegaConf checks overrides against."""
    keys: list[tuple[str, Any, Any]] = []
    for setting in settings().values():
        if setting.name not in DECIDED_HERE:
            kind = setting.kind | None if setting.optional else setting.kind
            keys.append((setting.name, kind, dataclasses.field(default=setting.default)))
            keys += [(old, setting.kind | None, dataclasses.field(default=None)) for old in setting.old_names]
    of_the_sweep = [("sweep_dir", str), ("generation_interval", int), ("devices", list[str])]
    keys += [(name, kind, dataclasses.field(default=MISSING)) for name, kind in of_the_sweep]
    return dataclasses.make_dataclass("Settings", keys)


ConfigStore.instance().store(name="settings", node=schema())


def job_of(config: dict[str, Any], number: int = 0) -> Job:
    """The job of one combination of values; `number` says whose turn at `devices` it is."""
    old = {name for setting in settings().values() for name in setting.old_names}
    values = by_new_names({key: v for key, v in config.items() if key not in old or v is not None})
    sweep_dir, interval = values.pop("sweep_dir"), values.pop("generation_interval")
    if devices := values.pop("devices"):
        values["device"] = devices[number % len(devices)]
    return Job(RunConfig(output_dir=str(sweep_dir), **values), interval)


@hydra.main(version_base=None, config_path=".", config_name="sweep")
def sweep(config: DictConfig) -> None:
    """One job, wherever Hydra's launcher puts it."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    own = HydraConfig.get()
    job = job_of({str(k): v for k, v in values.items()}, own.job.num)
    if own.launcher._target_ == ALONE:
        run_job(job)
        return
    # The bars of jobs side by side would tear one another apart; what the logs say still comes through.
    with (Path(own.runtime.output_dir) / "progress.log").open("a") as bars, redirect_stderr(bars):
        run_job(job)


def sweep_dir(overrides: list[str]) -> Path:
    """The sweep's folder, as the overrides or the configuration say."""
    with hydra.initialize_config_dir(str(Path(__file__).parent.resolve()), version_base=None):
        own = [o for o in overrides if o.startswith("sweep_dir=")]
        return Path(hydra.compose("sweep", own).sweep_dir)
