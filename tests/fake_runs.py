"""Folders of finished runs, made up: weights, log, scores and downstream results in the real formats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from sphere.checkpoints import read_weights, run_folder, write_checkpoint, write_config
from sphere.downstream import metrics
from sphere.evaluation.summary import retention, summarise
from sphere.evaluation.weight_change import WeightChange
from sphere.files import write_json
from sphere.hypersphere import hyperspherical_energy
from sphere.runs.run import RunConfig

NAMES = ("model.layers.4.mlp.down_proj.weight", "model.layers.5.mlp.down_proj.weight")
TASKS = {"reasoning": None, "nli": "true", "open_domain_qa": None, "closed_domain_qa": "yes"}


def fake_run(
    output: Path,
    method: str = "AlphaEdit",
    beta_hse: float = 0.5,
    *,
    kind: str = "counterfact",
    batches: int = 4,
    batch: int = 10,
    harm: float = 0.1,
    seed: int = 0,
    scored: bool = True,
    downstream: bool = True,
    **config: Any,
) -> Path:
    """A run of `batches` batches; `harm` says how fast scores fall and energies rise."""
    alpha = 0.5 if method == "AlphaEdit" else 0.8
    dataset = "mcf" if kind == "counterfact" else "zsre"
    folder = run_folder(output, method, "SmolLM2-135M", dataset, batch, beta_hse, alpha)
    edits = [batch * (i + 1) for i in range(batches)]
    settings = RunConfig(alg_name=method, ds_name=dataset, beta_hse=beta_hse, alpha=alpha, seed=seed)
    own = {
        "num_edits": batch,
        "case_ids": list(range(edits[-1])),
        "model": "fingerprint",
        "transposed": [],
        "hparams": {"layers": [4, 5], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj"},
    }
    write_config(folder, {**vars(settings), **own, **config})
    _weights_and_log(folder, edits, harm, beta_hse, seed)
    generator = random.Random(seed)
    if scored:
        original = read_weights(folder / "edit_0.safetensors")
        rows = []
        for n in (0, *edits):
            quality = max(0.95 - harm * n / batch, 0.1) if n else 0.05
            cases = _cases(kind, n or edits[-1], quality, generator if n else random.Random(0))
            row = _row(f"edit_{n}" if n else "unedited", n, cases)
            weights = (
                WeightChange(original).measure(read_weights(folder / f"edit_{n}.safetensors")) if n else None
            )
            rows.append(row | {"text_perplexity": 20.0 + 100 * harm * n, "weights": weights})
            _write_cases(folder / "summary" / f"cases_edit_{n}.jsonl", cases)
        summary = {"dataset": dataset, "seed": 0, "generation_interval": 0, "checkpoints": rows}
        write_json(folder / "summary" / "summary.json", summary)
    if downstream:
        states = {}
        for n in (0, *edits):
            scores = {
                t: _task(positive, max(0.6 - harm * n / batch / 2, 0.02), generator)
                for t, positive in TASKS.items()
            }
            states[f"edit_{n}"] = {"n_edits": n, "tasks": scores}
        write_json(folder / "rect_eval" / "summary.json", {"num_tests": 50, "checkpoints": states})
    return folder


def _weights_and_log(folder: Path, edits: list[int], harm: float, beta_hse: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(7)  # the same unedited weights for all runs
    original = {name: torch.randn(24, 40, generator=generator) for name in NAMES}
    write_checkpoint(folder, 0, original)
    generator.manual_seed(seed)
    weights = {name: w.clone() for name, w in original.items()}
    lines = []
    for index, n in enumerate(edits):
        layers = {}
        for name, weight in weights.items():
            before = weight.clone()
            common = torch.randn(1, 40, generator=generator)
            weight += harm * (common + 0.3 * torch.randn(24, 40, generator=generator))
            reference = hyperspherical_energy(original[name])
            energy = hyperspherical_energy(weight)
            layers[name] = {
                "weight_norm": float(before.norm()),
                "delta_norm": float((weight - before).norm()),
                "rank": 7,
                "principal_share_before": 0.3 + harm + 0.01 * index,
                "principal_share_after": (0.1 if beta_hse else 0.3) + harm + 0.01 * index,
                "energy": energy,
                "energy_change": (energy - reference) / reference,
                "condition": 12.5,
            }
        write_checkpoint(folder, n, weights)
        lines.append({"batch": index, "n_edits": n, "seconds": 12.0 + index, "layers": layers})
    (folder / "batches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _row(label: str, n_edits: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "label": label,
        "n_edits": n_edits,
        "metrics": summarise(cases),
        "retention": retention(cases),
        "unedited": {},
    }


def _cases(kind: str, n: int, quality: float, generator: random.Random) -> list[dict[str, Any]]:
    """Cases as `sphere.evaluation.scoring` makes them, right with probability `quality`."""

    def entry(chance: float) -> dict[str, Any]:
        right = float(generator.random() < chance)
        if kind == "counterfact":
            return {"success": right, "accuracy": right, "prob_diff": right - 0.5}
        same = {"accuracy_given_answer": right, "accuracy_unedited_prediction": right}
        return {"accuracy": right, "predicted": [int(right)], **same}

    chances = {"rewrite": quality, "paraphrase": 0.9 * quality, "neighborhood": 0.7}
    return [
        {"kind": kind, "case_id": i, **{name: [entry(chance)] for name, chance in chances.items()}}
        for i in range(n)
    ]


def _write_cases(path: Path, cases: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [{"format": 2}, *({"record": "digest", "case": case} for case in cases)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _task(positive: str | None, accuracy: float, generator: random.Random) -> dict[str, Any]:
    other = "false" if positive == "true" else "no"
    records = []
    for _ in range(50):
        right = generator.random() < accuracy
        answer = generator.choice([positive or "42", other])
        prediction = answer if right else (other if answer == positive else positive)
        records.append({"correct": right, "prediction": prediction, "answers": [answer]})
    return metrics.task_metrics(records, positive)
