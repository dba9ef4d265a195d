"""How long the jobs of a sweep will take: by the plan before the first of them, by those that are finished later.

    <sweep_dir>/forecast.json    what the plan expects of each job, by its folder

A finished job says what an edit costs, its scoring included; that replaces the plan's estimate for jobs of the same
method, model and batch size, and scales it for the others. Knows jobs and plans. Knows nothing of Hydra.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sphere.checkpoints import LOG_NAME, read_log
from sphere.errors import SphereError
from sphere.evaluation.summary import format_lines
from sphere.files import read_json, write_json
from sphere.models import resolve_device
from sphere.runs.config import RunConfig
from sphere.runs.facts_file import n_edits_of
from sphere.runs.folder import JOB_NAME
from sphere.runs.job import Job
from sphere.runs.memory import DEVICE, DISK
from sphere.runs.operation_counter import Counted
from sphere.runs.plan import plan_run
from sphere.runs.rates import measure_rates
from sphere.runs.sweep import finished_before

log = logging.getLogger(__name__)

FORECAST_NAME = "forecast.json"


@dataclass(frozen=True)
class Expected:
    """One job.

    Attributes:
        folder: of its run.
        like: jobs with the same cost of an edit share this.
        n_edits: of the whole run.
        seconds: that the plan expects the editing to take; None where it cannot tell.
        memory, disk: bytes that the plan expects it to hold at most, on its device and in files.
        done: edits that are in the log.
        measured: seconds that the finished job took, with its scoring; None: it is not finished.
    """

    folder: str
    like: str
    n_edits: int
    seconds: float | None
    done: int = 0
    measured: float | None = None
    memory: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Cost:
    """What the plan says of a run: see `Expected`."""

    seconds: float | None = None
    memory: int = 0
    disk: int = 0


def expect(jobs: Iterable[Job]) -> list[Expected]:
    """What is to be expected of jobs, and how far each is."""
    expected, rates, known = [], _Rates(), dict[RunConfig, Cost]()
    counted: dict[Hashable, Counted] = {}
    for job in jobs:
        finished = finished_before(job)
        try:
            n_edits = n_edits_of(job.config)
            alike = replace(job.config, output_dir="", seed=0, shuffle=False, dataset_size_limit=n_edits)
            if alike not in known:
                known[alike] = _cost(alike, n_edits, rates, counted)
            cost = known[alike]
        except SphereError as error:  # the job will say so itself
            log.warning("%s: %s", job.folder, error)
            n_edits, cost = 0, Cost()
        expected.append(
            Expected(
                str(job.folder),
                f"{job.config.alg_name} {job.config.model_name} {job.config.num_edits}",
                n_edits,
                cost.seconds,
                _edits_done(job.folder),
                finished["seconds"] if finished else None,
                cost.memory,
                cost.disk,
            )
        )
    return expected


class _Rates:
    """Operations per second of each device and dtype, measured once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Any], dict[str, float]] = {}

    def of(self, device: str, dtype: Any) -> dict[str, float]:
        if (device, dtype) not in self._known:
            self._known[device, dtype] = measure_rates(device, dtype)
        return self._known[device, dtype]


def _cost(config: RunConfig, n_edits: int, rates: _Rates, counted: dict[Hashable, Counted]) -> Cost:
    """By the plan; no time where the device is not here, or where the plan does not count all of a batch."""
    plan = plan_run(config, counted, n_edits)
    memory, disk = plan.peak(DEVICE)[1], plan.peak(DISK)[1]
    try:
        device = str(resolve_device(config.device))
    except SphereError:
        return Cost(None, memory, disk)
    batch = plan.seconds(rates.of(device, plan.dtype))
    return Cost(None if batch is None else batch * n_edits / min(config.num_edits, n_edits), memory, disk)


def _edits_done(folder: Path) -> int:
    batches = read_log(folder / LOG_NAME)
    return batches[-1]["n_edits"] if batches else 0


def remaining(expected: Sequence[Expected]) -> tuple[float, int]:
    """(seconds that the jobs which are not finished will take one after the other, number of jobs it does not know)."""
    finished = [job for job in expected if job.measured is not None and job.n_edits]
    planned = [job for job in finished if job.seconds]
    scale = (
        sum(job.measured or 0 for job in planned) / sum(job.seconds or 0 for job in planned)
        if planned
        else 1.0
    )
    total, unknown = 0.0, 0
    for job in expected:
        if job.measured is not None:
            continue
        alike = [other for other in finished if other.like == job.like]
        if alike:
            cost = sum(other.measured or 0 for other in alike) / sum(other.n_edits for other in alike)
            total += cost * max(job.n_edits - job.done, 0)
        elif job.seconds is not None and job.n_edits:
            total += scale * job.seconds * max(job.n_edits - job.done, 0) / job.n_edits
        else:
            unknown += 1
    return total, unknown


def write_forecast(sweep_dir: Path, expected: Sequence[Expected]) -> None:
    """Keep what is expected, for the jobs to say how far the sweep is."""
    write_json(sweep_dir / FORECAST_NAME, [asdict(job) for job in expected])


def progress_line(sweep_dir: Path) -> str | None:
    """How many jobs of the sweep are finished and what is left, as job.json of each says; None without a forecast."""
    path = sweep_dir / FORECAST_NAME
    if not path.exists():
        return None
    expected = [Expected(**entry) for entry in read_json(path, "forecast")]
    now = [_now(job) for job in expected]
    return f"{sum(job.measured is not None for job in now)} of {len(now)} jobs are finished; {_left(now)}."


def _now(job: Expected) -> Expected:
    """The same job as it stands on the disk."""
    folder = Path(job.folder)
    path = folder / JOB_NAME
    state = read_json(path, "job") if path.exists() else {}
    measured = state["seconds"] if state.get("status") == "finished" else None
    return replace(job, done=_edits_done(folder), measured=measured)


def format_forecast(expected: Sequence[Expected], sweep_dir: Path) -> str:
    """What is to be expected, for the terminal."""
    lines = [["job", "edits", "editing", "state"]]
    for job in expected:
        folder = Path(job.folder)
        name = folder.relative_to(sweep_dir) if folder.is_relative_to(sweep_dir) else folder
        state = f"{job.done} edits done" if job.done else "not begun"
        lines.append(
            [
                str(name),
                str(job.n_edits or "?"),
                "?" if job.seconds is None else f"about {duration(job.seconds)}",
                state if job.measured is None else f"finished in {duration(job.measured)}",
            ]
        )
    note = (
        "By the plan, at the rates measured here, one job after the other; until a job is finished, without scoring "
        "and without second moments that are still to be collected."
    )
    most, files = max((job.memory for job in expected), default=0), sum(job.disk for job in expected)
    room = f"A job holds up to {most / 2**30:.2f} GiB of memory at a time, all files together {files / 2**30:.2f} GiB."
    return f"{format_lines(lines)}\n\n{len(expected)} jobs; {_left(expected)}. {note}\n{room}"


def _left(expected: Sequence[Expected]) -> str:
    seconds, unknown = remaining(expected)
    if all(job.measured is not None for job in expected):
        return "nothing is left to do"
    parts = [f"about {duration(seconds)} to go"] if seconds else []
    parts += [f"{unknown} jobs of which it is not known yet how long they take"] if unknown else []
    return " and ".join(parts) or "only scoring is left"


def duration(seconds: float) -> str:
    """In words, to two digits or so: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
