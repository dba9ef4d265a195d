"""Compare methods, rules, models and datasets over seeds: a sweep whose seed also decides the order of the facts.

    python -m experiments.compare alg_name=AlphaEdit,MEMIT,EMMET beta_hse=0,0.5
    python -m experiments.compare alg_name=MEMIT rules=null,revive,\\'rect,sphere\\' ds_name=mcf,zsre seed=range(5)
    python -m experiments.compare ... reference=MEMIT                  differences to another one than the first
    python -m experiments.compare hydra/launcher=joblib hydra.launcher.n_jobs=2 ...

`sphere sweep` with other defaults: seed=0,1,2 shuffle=true sweep_dir=Edited_Weight/compare. All of its keys can be
given (`sphere sweep --help`). It says beforehand what the jobs will take (dry_run=true: only that), goes on where it
was stopped, and ends with a table of the configurations, their means over facts and seeds with intervals, and the
paired differences over the same facts and seeds; the report in <sweep_dir>/report has both, and the figures.
"""

from __future__ import annotations

import sys

from sphere.commands.common import run_cli
from sphere.commands.sweep import main as sweep

DEFAULTS = ("sweep_dir=Edited_Weight/compare", "shuffle=true", "seed=0,1,2")


def main(argv: list[str] | None = None) -> int:
    """Run the sweep, with these defaults."""
    overrides = sys.argv[1:] if argv is None else argv
    if "--help" in overrides or "-h" in overrides:
        print(__doc__)
        return 0
    return sweep([*DEFAULTS, *overrides])


if __name__ == "__main__":
    run_cli(main, spelled="{}=")
