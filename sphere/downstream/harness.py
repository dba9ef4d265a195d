"""EleutherAI's lm-evaluation-harness on a model in memory: an optional extra, offline where the data is local.

Tasks of this project lie in `data/lm_eval_tasks` as YAML over the files of `task-data`; any other name is the
harness's own and may need its data set from the network. Knows nothing of checkpoints.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.downstream.tasks import FOLDER
from sphere.errors import SphereError, first_line
from sphere.evaluation.states import State
from sphere.files import atomic_path, read_json, write_json
from sphere.forward.passes import PassOptions
from sphere.resources import shipped

log = logging.getLogger(__name__)

LOCAL_TASKS = shipped("data/lm_eval_tasks")
DATA_PREFIX = f"data/{FOLDER}/"  # how the YAML files name the local data
BATCH_SIZE = 8
BOOTSTRAP = 200  # resamples for the standard errors of F1 and MCC


class Harness:
    """Runs chosen harness tasks.

    Args:
        tasks: task names.
        data_dir: holds `task-data`, which the local tasks read, and may hold further `lm_eval_tasks/*.yaml`.
        limit: only the first so many examples of each task.
        passes: how forward passes are cut: at most BATCH_SIZE sequences, and fewer of long ones.

    Raises:
        SphereError: lm-eval is not installed, or a local task's data file is missing.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        data_dir: str | Path,
        limit: int | None = None,
        passes: PassOptions | None = None,
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise SphereError(
                "lm-evaluation-harness is not installed: run `pip install -r requirements-extra.txt`.",
                argument="lm_eval_tasks",
            )
        self.tasks = list(dict.fromkeys(tasks))
        self.data_dir = Path(data_dir).resolve()
        self.limit = limit
        self.passes = passes or PassOptions()
        self.local = local_tasks(self.data_dir)
        for task in self.tasks:
            if task in self.local:
                _check_data(self.local[task], self.data_dir)

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: State
    ) -> dict[str, dict[str, Any]]:
        """Metrics by task; `<folder>/<task>.json` and `<task>_samples.jsonl` keep them, finished tasks are not rerun.

        Args:
            state: in which the model is.

        Raises:
            SphereError: a task that the harness does not know or whose data it cannot get.
        """
        results, missing, keys = {}, [], {}
        for task in self.tasks:
            path = folder / f"{task}.json"
            old = read_json(path, "lm-eval result") if path.exists() else {}
            keys[task] = state.digest(**self._settings(task))
            if old.get("key") == keys[task]:
                results[task] = {name: value for name, value in old.items() if name != "key"}
            else:
                missing.append(task)
        for task, (metrics, samples) in self._evaluate(model, tokenizer, missing).items():
            with (
                atomic_path(folder / f"{task}_samples.jsonl") as temporary,
                temporary.open("w", encoding="utf-8") as file,
            ):
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
            write_json(folder / f"{task}.json", metrics | {"key": keys.get(task)})
            results[task] = metrics
        return {task: results[task] for task in self.tasks if task in results}

    def _settings(self, task: str) -> dict[str, Any]:
        """What decides a task's numbers beside the model: its definition, with the data of a local one."""
        version = importlib.metadata.version("lm_eval")
        settings = {"task": task, "limit": self.limit, "lm_eval_version": version}
        if task not in self.local:
            return settings
        files = [self.local[task], *_data_files(self.local[task], self.data_dir)]
        return settings | {"files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]}

    def _evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str]
    ) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
        if not tasks:
            return {}
        import lm_eval
        from lm_eval.tasks import TaskManager

        with tempfile.TemporaryDirectory() as scratch:
            render(self.local, self.data_dir, Path(scratch))
            only_local = all(
                task in self.local for task in tasks
            )  # the harness's own index takes seconds to read
            manager = TaskManager(include_path=scratch, include_defaults=not only_local)
            for task in tasks:
                if not manager.match_tasks([task]):
                    raise SphereError(
                        f"lm-evaluation-harness knows no task '{task}': use one of {', '.join(sorted(self.local))} or "
                        "of `lm_eval ls tasks`."
                    )
            # The harness changes a tokenizer's padding.
            wrapped = _harness_model(model, copy.deepcopy(tokenizer), self.passes.decoding_tokens)
            try:
                output = lm_eval.simple_evaluate(
                    wrapped,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAP,
                )
            except (OSError, ValueError) as error:  # data sets that cannot be had
                raise SphereError(
                    f"lm-evaluation-harness could not run {', '.join(tasks)} ({first_line(error)}): check the names "
                    "and the network, or use the local tasks."
                ) from error
        return {
            task: (
                self._metrics(task, output, lm_eval.__version__),
                _samples(output["samples"].get(task, [])),
            )
            for task in output["results"]
        }

    def _metrics(self, task: str, output: dict[str, Any], version: str) -> dict[str, Any]:
        """The harness's numbers, with what made them.

        Its key "metric,filter" is "metric" here, unless several filters give that metric.
        """
        found = {
            key: float(value)
            for key, value in output["results"][task].items()
            if "," in key and isinstance(value, int | float)
        }
        metrics = {key: key.partition(",")[0] for key in found}
        filters = Counter(metrics.values())  # metric -> how many filters give it
        figures = {metric if filters[metric] == 1 else key: found[key] for key, metric in metrics.items()}
        n = output.get("n-samples", {}).get(task, {}).get("effective")
        return {"n": n, **figures, "limit": self.limit, "lm_eval_version": version}


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> Any:
    """The model as the harness takes it, its batches as small as their longest sequence asks."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # within the function: lm-eval is an extra, and takes seconds to import
        def _fit(self, longest: int) -> None:
            longest = min(max(longest, 1), self.max_length)
            self.batch_size_per_gpu = min(max(batch_tokens // longest, 1), BATCH_SIZE)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self._fit(max((len(context) + len(rest) for _, context, rest in requests), default=1))
            return super()._loglikelihood_tokens(requests, *args, **options)

        def loglikelihood_rolling(self, requests: Any, *args: Any, **options: Any) -> Any:
            self._fit(max((len(self.tok_encode(request.args[0])) + 1 for request in requests), default=1))
            return super().loglikelihood_rolling(requests, *args, **options)

        def generate_until(self, requests: Any, *args: Any, **options: Any) -> Any:
            self._fit(max((len(self.tok_encode(request.args[0])) for request in requests), default=1))
            return super().generate_until(requests, *args, **options)

    return Model(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)


def _samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("doc_id", "filter", "target", "resps", "filtered_resps", "exact_match", "acc")
    return [{key: sample[key] for key in kept if key in sample} for sample in samples]


def local_tasks(data_dir: Path) -> dict[str, Path]:
    """Name (= file name) -> YAML file of the tasks of this project and of `<data_dir>/lm_eval_tasks`."""
    folders = (LOCAL_TASKS, data_dir / "lm_eval_tasks")
    return {
        path.stem: path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.yaml"))
    }


def _data_files(task: Path, data_dir: Path) -> list[Path]:
    """The files that a local task reads."""
    words = task.read_text("utf-8").split()
    return [
        data_dir / FOLDER / word.removeprefix(DATA_PREFIX) for word in words if word.startswith(DATA_PREFIX)
    ]


def _check_data(task: Path, data_dir: Path) -> None:
    for path in _data_files(task, data_dir):
        if not path.is_file():
            raise SphereError(
                f"No task data at {path}, which {task.stem} reads: put the published file there or give the "
                "folder that holds task-data.",
                argument="data_dir",
            )


def render(tasks: dict[str, Path], data_dir: Path, target: Path) -> None:
    """Copy task folders to `target`, with the data's place written as `data_dir`."""
    for folder in {path.parent for path in tasks.values()}:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    for path in target.glob("*.yaml"):
        text = path.read_text("utf-8").replace(DATA_PREFIX, f"{data_dir.as_posix()}/{FOLDER}/")
        path.write_text(text, "utf-8")
