"""Run and score many configurations, each as `sphere edit` would, and put them in one table.

    sphere sweep alg_name=AlphaEdit,MEMIT beta_hse=0,0.5 seed=0,1
    sphere sweep hydra/launcher=joblib hydra.launcher.n_jobs=2 ...             two jobs at a time
    sphere sweep hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=1 ...   a Slurm job each

Every key=value is one of sphere/commands/sweep.yaml or a flag of `sphere edit`; a comma-separated list makes one job
per value. Jobs are Hydra's (multirun); its launchers say where they run. A sweep that was stopped goes on with the same
command: finished jobs are not run again, the others continue. At the end <sweep_dir>/sweep.md, sweep.csv and sweep.json
hold all jobs of the folder, and the command of a report on them is printed. `python -m experiments.sweep` is the same
command, in a checkout.
"""

from __future__ import annotations

import sys

from sphere.errors import SphereError


def main(argv: list[str] | None = None) -> int:
    """Run the sweep, then make its table."""
    overrides = sys.argv[1:] if argv is None else argv
    if "--help" in overrides or "-h" in overrides:
        print(__doc__)
        return 0
    from sphere.commands.sweep_job import sweep, sweep_dir
    from sphere.runs.sweep import collect, format_sweep, report_command

    sys.argv[1:] = overrides  # read by Hydra
    sweep()
    folder = sweep_dir(overrides)
    rows = collect(folder)
    print(f"\n{format_sweep(rows)}\n")
    print(f"Tables: {folder / 'sweep.md'}, sweep.csv, sweep.json")
    if any(row["metrics"] for row in rows):
        print(f"Report: {report_command(rows)}")
    open_ = [row for row in rows if row["status"] != "finished"]
    if open_:
        raise SphereError(
            f"{len(open_)} of {len(rows)} jobs are not finished (see the table): fix what it says and start again."
        )
    return 0
