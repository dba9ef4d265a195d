"""SPHERE in minutes: MEMIT in a setting that wrecks it, without and with SPHERE, on facts of the starter set.

    python -m experiments.demo

is `make demo`: a sweep of two runs (`sphere.commands.sweep`) with its table and its report, and one figure of both. The
setting is a stress test (hparams/MEMIT/SmolLM2-135M-demo.json): small batches, few but large steps of z on the bare
prompt alone, and a second moment that weighs 250 times less than shipped, so that a hundred facts do what a thousand do
otherwise. The results of the shipped settings are in docs/results.md. It goes on where it was stopped; further
key=value words are those of the sweep.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sphere.commands.common import run_cli

FOLDER = Path("Edited_Weight/demo")
N_FACTS, PER_BATCH = 120, 5
SETTINGS = (
    f"sweep_dir={FOLDER}",
    "alg_name=MEMIT",
    "beta_hse=0,0.5",
    "hparams_fname=SmolLM2-135M-demo.json",
    f"dataset_size_limit={N_FACTS}",
    f"num_edits={PER_BATCH}",
    "checkpoints='60,120'",
    "log_energy_every=4",
)
# Both runs at a time, each on half of the cores.
LAUNCHER = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
CAPTION = (
    "A stress setting, in which MEMIT breaks within a hundred facts: without SPHERE it forgets what it wrote and "
    "the energy of its weights runs off, with SPHERE later. At the shipped settings the same happens within a thousand "
    "facts, and AlphaEdit does not break: docs/results.md."
)


def main(argv: list[str] | None = None) -> int:
    """Edit, score, report; draw the figure and say where it is."""
    overrides = sys.argv[1:] if argv is None else argv
    if "--help" in overrides or "-h" in overrides:
        print(__doc__)
        return 0
    from sphere.commands.sweep import main as sweep
    from sphere.commands.sweep_job import own_settings

    chosen = any(word.startswith("hydra/launcher=") for word in overrides)
    words = [*SETTINGS, *(() if chosen else LAUNCHER), *overrides]
    code = sweep(words)
    folder = Path(own_settings(words).sweep_dir)
    if (folder / "report").exists():
        _figure(folder)
    return code


def _figure(folder: Path) -> None:
    from sphere.files import atomic_path
    from sphere.report.collect import load_runs, measure
    from sphere.report.figures import score_and_energy
    from sphere.report.page import png
    from sphere.report.style import drawing
    from sphere.report.terminal import show
    from sphere.runs.sweep_table import collect

    runs = load_runs([row["folder"] for row in collect(folder) if row["metrics"]])
    measure(runs, progress=False)
    with drawing():
        image = png(score_and_energy(runs))
    path = folder / "demo.png"
    with atomic_path(path) as temporary:
        temporary.write_bytes(image)
    show(image, sys.stdout, os.environ)
    print(f"\n{CAPTION}\n\nFigure: {path}")


if __name__ == "__main__":
    run_cli(main, spelled="{}=")
