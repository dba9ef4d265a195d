"""Run and score many configurations, each as experiments.evaluate would, and put them in one table.

    python -m experiments.sweep alg_name=AlphaEdit,MEMIT beta_hse=0,0.5 seed=0,1
    python -m experiments.sweep hydra/launcher=joblib hydra.launcher.n_jobs=2 ...             two jobs at a time
    python -m experiments.sweep hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=1 ...   a Slurm job each

Every key=value is one of experiments/sweep.yaml or a flag of experiments.evaluate; a comma-separated list makes one
job per value. Jobs are Hydra's (multirun); its launchers say where they run. A sweep that was stopped goes on with
the same command: finished jobs are not run again, the others continue. At the end <sweep_dir>/sweep.md, sweep.csv and
sweep.json hold all jobs of the folder, and the command of a report on them is printed.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from sphere.commands.common import run_cli
from sphere.errors import SphereError
from sphere.runs.config import RunConfig
from sphere.runs.sweep import Job, collect, format_sweep, report_command, run_job

ALONE = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # one job after the other
DECIDED_HERE = ("output_dir", "continue_from_run", "overwrite")


def settings() -> type:
    """The keys of a sweep, those of `RunConfig` among them, as a class that OmegaConf checks overrides against."""
    hints = typing.get_type_hints(RunConfig)
    of_a_run = [
        (f.name, hints[f.name], dataclasses.field(default=f.default))
        for f in dataclasses.fields(RunConfig)
        if f.name not in DECIDED_HERE
    ]
    of_the_sweep = [("sweep_dir", str), ("generation_interval", int), ("devices", list[str])]
    return dataclasses.make_dataclass(
        "Settings", [*of_a_run, *((k, t, dataclasses.field(default=MISSING)) for k, t in of_the_sweep)]
    )


ConfigStore.instance().store(name="settings", node=settings())


def job_of(config: dict[str, Any], number: int = 0) -> Job:
    """The job of one combination of values; `number` says whose turn at `devices` it is."""
    values = dict(config)
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


def main(argv: list[str] | None = None) -> int:
    """Run the sweep, then make its table."""
    overrides = sys.argv[1:] if argv is None else argv
    if "--help" in overrides or "-h" in overrides:
        print(__doc__)
        return 0
    sys.argv[1:] = overrides
    sweep()
    rows = collect(sweep_dir(overrides))
    print(f"\n{format_sweep(rows)}\n")
    print(f"Tables: {sweep_dir(overrides) / 'sweep.md'}, sweep.csv, sweep.json")
    if any(row["metrics"] for row in rows):
        print(f"Report: {report_command(rows)}")
    open_ = [row for row in rows if row["status"] != "finished"]
    if open_:
        raise SphereError(
            f"{len(open_)} of {len(rows)} jobs are not finished (see the table): mend what it says and start again."
        )
    return 0


def sweep_dir(overrides: list[str]) -> Path:
    """The sweep's folder, as the overrides or the configuration say."""
    with hydra.initialize_config_dir(str(Path(__file__).parent.resolve()), version_base=None):
        own = [o for o in overrides if o.startswith("sweep_dir=")]
        return Path(hydra.compose("sweep", own).sweep_dir)


if __name__ == "__main__":
    run_cli(main)
