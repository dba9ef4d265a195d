"""Run and score many configurations, each as `sphere edit` would, and put them in one table.

    sphere sweep alg_name=AlphaEdit,MEMIT beta_hse=0,0.5 seed=0,1
    sphere sweep hydra/launcher=joblib hydra.launcher.n_jobs=2 ...             two jobs at a time
    sphere sweep hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=1 ...   a Slurm job each

Every key=value is one of sphere/commands/sweep.yaml or a flag of `sphere edit`; a comma-separated list makes one job
per value. First the jobs are listed with the time that they are expected to take; dry_run=true stops there. Jobs are
Hydra's (multirun); its launchers say where they run. A sweep that was stopped goes on with the same command: finished
jobs are not run again, the others continue. At the end <sweep_dir>/sweep.md, sweep.csv and sweep.json hold all jobs of
the folder, and <sweep_dir>/report compares them (report=false: not), runs of the same facts by paired differences,
means over seeds where there are several.
`python -m experiments.sweep` is the same command, in a checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphere.errors import SphereError

if TYPE_CHECKING:
    from sphere.runs.job import Job


def main(argv: list[str] | None = None) -> int:
    """Run the sweep, then make its table."""
    overrides = sys.argv[1:] if argv is None else argv
    if "--help" in overrides or "-h" in overrides:
        print(__doc__)
        return 0
    from hydra.errors import HydraException

    from sphere.commands.sweep_job import own_settings, sweep
    from sphere.runs.sweep import finished_other
    from sphere.runs.sweep_table import collect, format_sweep

    try:
        own = own_settings(overrides)
    except HydraException as error:
        raise SphereError(f"These settings of a sweep are not understood: {error}") from error
    folder = Path(own.sweep_dir)
    jobs = _forecast(overrides, folder, keep=not own.dry_run)
    if own.dry_run:
        return 0
    sys.argv[1:] = overrides  # read by Hydra
    sweep()
    rows = collect(folder)
    print(f"\n{format_sweep(rows)}\n")
    print(f"Tables: {folder / 'sweep.md'}, sweep.csv, sweep.json")
    if own.report and any(row["metrics"] for row in rows):
        _report(rows, folder, own.reference)
    open_ = [row for row in rows if row["status"] != "finished"]
    if open_:
        raise SphereError(
            f"{len(open_)} of {len(rows)} jobs are not finished (see the table): fix what it says and start again."
        )
    if failed := [job.folder for job in jobs if finished_other(job)]:
        raise SphereError(
            f"{len(failed)} of {len(jobs)} jobs failed (see the log), the first in {failed[0]}, where a finished job "
            "of other settings keeps its place: fix what the log says, or give another sweep_dir.",
            argument="sweep_dir",
        )
    return 0


def _forecast(overrides: list[str], folder: Path, keep: bool) -> list[Job]:
    """Say which jobs there are and how long they will take; `keep`: for the jobs to say how far the sweep is.

    Raises:
        SphereError: different jobs in one folder.
    """
    from hydra.errors import HydraException

    from sphere.commands.sweep_job import jobs_of
    from sphere.runs.forecast import expect, format_forecast, write_forecast
    from sphere.runs.job import check_folders

    try:
        jobs = jobs_of(overrides)
    except HydraException:  # which Hydra says itself as it starts
        return []
    check_folders(jobs)
    expected = expect(jobs)
    print(f"{format_forecast(expected, folder)}\n", flush=True)
    if keep:
        write_forecast(folder, expected)
    return jobs


def _report(rows: Sequence[Mapping[str, Any]], folder: Path, reference: str | None) -> None:
    """One report of all finished runs, with the differences of those that can be compared."""
    from sphere.report import make_report, report_text
    from sphere.runs.sweep_table import report_command

    page = make_report([row["folder"] for row in rows if row["metrics"]], folder, reference=reference)
    if text := report_text(page):
        print(f"\n{text}\n")
    print(f"Report: {page}, again by {report_command(rows, folder, reference)}")
