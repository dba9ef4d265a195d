"""Tuning from start to file: layers by causal tracing, then numbers by a search, then hparams/<method>/<model>.json.

    <output_dir>/tune/<alg_name>/<model>/

    tune.json                    the start and the settings, which must be the same when it is continued
    trace.json                   average indirect effects by layer, and the layers chosen
    study.journal                the trials, as Optuna keeps them
    trials.csv                   the trials, as a table
    causal_trace.svg, .png       the figures
    history.svg, .png

Knows the order of things and the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sphere.data.records import Record
from sphere.errors import SphereError
from sphere.files import atomic_path, read_json, write_json
from sphere.fingerprint import Fingerprint
from sphere.forward.layers import LayerStack
from sphere.forward.module_templates import module_templates
from sphere.forward.scorer import PackedScorer
from sphere.hparams import HParams, hparams_from_dict, load_hparams
from sphere.lock import locked
from sphere.methods import Method, get_method
from sphere.models import load_model, meta_model, model_label
from sphere.report.figures import Drawn
from sphere.report.page import png, svg
from sphere.report.style import drawing
from sphere.resources import find
from sphere.runs.config import RunConfig
from sphere.runs.hparams import format_hparams, hparams_of, write_path
from sphere.runs.resolve import sphere_numbers
from sphere.tuning.causal_trace import causal_trace, choose_layers, known_facts, subject_noise
from sphere.tuning.figures import effects, history
from sphere.tuning.objective import Objective, Outcome
from sphere.tuning.options import TuneOptions
from sphere.tuning.search import Search, check_optuna
from sphere.tuning.search_space import SearchSpace, Spectrum, needs_spectrum
from sphere.tuning.trials import trial_rows, write_table
from sphere.tuning.tuning_set import statements, tuning_set
from sphere.values.tokenization import padding_id

log = logging.getLogger(__name__)

FOLDER = "tune"
CONFIG_NAME, TRACE_NAME, STUDY_NAME, TABLE_NAME = "tune.json", "trace.json", "study.journal", "trials.csv"


@dataclass(frozen=True)
class Tuned:
    """What a tuning has found.

    Attributes:
        path: the hyperparameter file.
        folder: tables, figures and the state of the search.
        hparams: what the file holds.
        trials: one row per trial: {"trial", "state", the fields of `Outcome`, the numbers as a file holds them}.
        best: the row whose numbers were written.
    """

    path: Path
    folder: Path
    hparams: HParams
    trials: list[dict[str, Any]]
    best: dict[str, Any]


def tune(config: RunConfig, options: TuneOptions, command: str | None = None) -> Tuned:
    """Find hyperparameters of a method for a model, and write their file; goes on where an earlier call was stopped.

    Args:
        config: the runs that it is for: method, model, dataset, rules, batch size, machine.
        command: kept with the result.

    Raises:
        SphereError: anything that the user can fix; the trials that are finished are kept.
    """
    config.check()
    check_optuna()
    method = get_method(config.alg_name)
    if config.facts is not None:
        raise SphereError("Tuning takes its facts from a published dataset: name one.", argument="ds_name")
    if not method.tuned:
        raise SphereError(
            f"{config.alg_name} names no numbers that can be searched: tune another method.",
            argument="alg_name",
        )
    folder = Path(config.output_dir) / FOLDER / config.alg_name / model_label(config.model_name)
    path = write_path(config)
    with locked(folder):
        previous = read_json(folder / CONFIG_NAME, "tuning") if (folder / CONFIG_NAME).exists() else {}
        _check_free(path, folder, config.overwrite)
        start = _start(config, options, method, previous)
        records = tuning_set(config.ds_name, config.data_dir, options.n_facts, config.seed)
        return _Tuning(config, options, method, folder, path, start, records, command).run()


def _check_free(path: Path, folder: Path, overwrite: bool) -> None:
    """Refuse to replace a hyperparameter file, one's own or a shipped one, that this tuning has not written."""
    there = find(path)
    if not there.exists() or overwrite:
        return
    content = read_json(there, "hyperparameter file")
    written = content.get("found_by") if isinstance(content, dict) else None
    if not isinstance(written, dict) or written.get("folder") != str(folder):
        raise SphereError(
            f"There is a hyperparameter file for this model and method at {there}: overwrite it, or write to another "
            "folder.",
            argument=("overwrite", "hparams_dir"),
        )


def _start(
    config: RunConfig, options: TuneOptions, method: type[Method], previous: Mapping[str, Any]
) -> HParams:
    """The hyperparameters that the search begins with.

    Of another model's file the numbers are taken; modules and the last layer are found in the model, and as many
    layers named. By default they are those of a run, or what an earlier session began with.
    """
    kind = method.hparams_class
    if options.from_hparams is not None:
        path = Path(options.from_hparams)
        if not find(path).exists():
            raise SphereError(
                f"No hyperparameter file at {path} to start from: check the path.", argument="from_hparams"
            )
        start, found = load_hparams(path, kind), module_templates(meta_model(config.model_name))
        layers = list(found.editable[: len(start.layers)])
        fitted = {"layers": layers, "v_loss_layer": found.n_layers - 1, **found.to_dict()}
        start = hparams_from_dict(start.to_dict() | fitted, kind)
    elif previous:
        start = hparams_from_dict(previous["start"], kind)
    else:
        start = hparams_of(config)
    if not isinstance(start, HParams):
        raise SphereError(
            f"{method.name} has no keys for target values and second moments: tune another method.",
            argument="alg_name",
        )
    corpus = {"mom2_dataset": options.mom2_dataset, "mom2_n_samples": options.mom2_n_samples}
    changed: dict[str, Any] = {key: value for key, value in corpus.items() if value is not None}
    return replace(start, **changed)


@dataclass
class _Tuning:
    """One tuning, in a folder that no other process is at.

    Attributes:
        method: whose numbers are searched.
        start: hyperparameters that it begins with.
        records: the tuning set.
    """

    config: RunConfig
    options: TuneOptions
    method: type[Method]
    folder: Path
    path: Path
    start: HParams
    records: list[Record]
    command: str | None

    def run(self) -> Tuned:
        began = time.perf_counter()
        config = self.config
        torch.manual_seed(config.seed)
        model, tokenizer = load_model(config.model_name, config.device, config.dtype, config.device_map)
        self._begin_or_continue(Fingerprint(model).now())
        layers = self._layers(model, tokenizer)
        hparams = replace(self.start, layers=layers)
        trials = Objective(config, model, tokenizer, hparams, self.records, self.options.max_perplexity)
        spectrum = None
        if needs_spectrum(self.method.tuned):
            spectrum = Spectrum([trials.second_moments.get(layer) for layer in layers])
        space = SearchSpace(hparams, self.method.tuned, trials.coordinate, spectrum)
        search = Search(self.folder / STUDY_NAME, config.seed)
        self._search(search, space, trials, began)
        return self._finish(search, space, layers)

    def _begin_or_continue(self, model: str) -> None:
        """Write what decides the tuning, or see that it is the same as in the earlier session."""
        c, o = self.config, self.options
        decided = {
            "start": self.start.to_dict(),
            "model": model,
            "layers": o.layers,
            "case_ids": [record.case_id for record in self.records],
            "requests": hashlib.sha256(repr([r.request for r in self.records]).encode()).hexdigest(),
            **sphere_numbers(c),
            **{key: getattr(c, key) for key in ("alg_name", "ds_name", "num_edits", "rules", "seed")},
            **{key: getattr(c, key) for key in ("directions", "project", "revive_tau", "z_matmul_dtype")},
            **{
                key: getattr(o, key)
                for key in ("max_perplexity", "trace_table", "trace_facts", "trace_draws")
            },
        }
        decided = json.loads(json.dumps(decided))
        path = self.folder / CONFIG_NAME
        # Earlier versions wrote no "project": theirs was the default.
        previous = {"project": RunConfig.project} | read_json(path, "tuning") if path.exists() else None
        if previous == decided:
            log.info("Continuing the tuning in %s.", self.folder)
            return
        if previous is not None:
            different = [key for key in decided if previous.get(key) != decided[key]]
            if not self.config.overwrite:
                raise SphereError(
                    f"The tuning in {self.folder} was begun with other settings ({', '.join(different)}): continue it "
                    "with the same ones, overwrite it, or use another folder.",
                    argument=("overwrite", "output_dir"),
                )
            for name in (TRACE_NAME, STUDY_NAME, TABLE_NAME):
                (self.folder / name).unlink(missing_ok=True)
        write_json(path, decided)

    # ---- layers ----

    def _layers(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The layers given, or those that causal tracing chooses; found once."""
        if self.options.layers:
            return self.options.layers
        path = self.folder / TRACE_NAME
        if path.exists():
            return tuple(read_json(path, "trace")["layers"])
        o, passes = self.options, self.config.passes
        scorer = PackedScorer(model, passes)
        facts = known_facts(scorer, tokenizer, statements(o.trace_table, self.config.seed), o.trace_facts)
        if not facts:
            raise SphereError(
                f"The model gives the right next token for none of the facts in {o.trace_table}: name the layers to "
                "edit, or give facts that it knows.",
                argument=("layers", "trace_table"),
            )
        noise = subject_noise(model.get_input_embeddings(), facts, o.trace_draws, self.config.seed)
        stack = LayerStack(model, self.start)
        trace = causal_trace(
            stack, facts, noise, batch_tokens=passes.editing_tokens, pad=padding_id(tokenizer)
        )
        layers = choose_layers(trace.average, len(self.start.layers), self._editable(model, stack.n_layers))
        self._draw(effects(trace.indirect, layers))
        log.info("Causal tracing on %d facts: layers %s.", len(facts), list(layers))
        means = {"clean": float(trace.clean.mean()), "corrupted": float(trace.corrupted.mean())}
        effect = {"average_indirect_effect": trace.average.tolist()}
        write_json(path, {"layers": list(layers), "n_facts": len(facts), **means, **effect})
        return layers

    def _editable(self, model: PreTrainedModel, n_layers: int) -> list[int]:
        """The layers that have the module to rewrite."""
        modules = dict(model.named_modules(remove_duplicate=False))
        return [n for n in range(n_layers) if self.start.rewrite_module_tmp.format(n) in modules]

    # ---- numbers ----

    def _search(self, search: Search, space: SearchSpace, trials: Objective, began: float) -> None:
        """Run the trials that are missing, as far as there is time."""
        total, done = self.options.n_trials, len(search.finished)
        times: list[float] = []
        with tqdm(total=total, initial=min(done, total), desc="tuning", unit="trial") as bar:
            while done < total:
                if self._too_late(began, times):
                    log.info("The time is up after %d of %d trials.", done, total)
                    return
                outcome = _one_trial(search, space, trials)
                times.append(outcome.seconds)
                done += 1
                best = max((t.value for t in search.finished if not search.is_pruned(t)), default=0.0)
                log.info(
                    "Trial %d: %.1f (best %.1f), %.0f s.", done - 1, outcome.value, best, outcome.seconds
                )
                bar.set_postfix(best=f"{best:.1f}", refresh=False)
                bar.update()
                write_table(self.folder / TABLE_NAME, trial_rows(search))

    def _too_late(self, began: float, times: Sequence[float]) -> bool:
        """Whether a trial of the mean length so far would end after the time that is given."""
        limit = self.options.timeout_minutes
        if limit is None or not times:
            return False
        return time.perf_counter() - began + sum(times) / len(times) > 60 * limit

    def _finish(self, search: Search, space: SearchSpace, layers: tuple[int, ...]) -> Tuned:
        """Write the best trial's hyperparameters, the table and the figure."""
        rows, trials = trial_rows(search), search.finished
        whole = [n for n, trial in enumerate(trials) if not search.is_pruned(trial)]
        best = max(whole, key=lambda n: (trials[n].value, -n))
        if not trials[best].value:
            reason = rows[best]["error"] or "every score is 0"
            raise SphereError(
                f"No trial edited the tuning set with success ({reason.rstrip('.')}): begin with other numbers.",
                argument="from_hparams",
            )
        write_table(self.folder / TABLE_NAME, rows)
        self._draw(history([row["value"] for row in rows], [row["state"] == "stopped" for row in rows]))
        hparams = space.hparams(trials[best].params)
        found_by = self._found_by(rows, best)
        content = format_hparams(self.config.model_name, hparams.to_dict() | {"found_by": found_by})
        with atomic_path(self.path) as temporary:
            temporary.write_text(content, "utf-8")
        return Tuned(self.path, self.folder, hparams, rows, rows[best])

    def _found_by(self, rows: Sequence[Mapping[str, Any]], best: int) -> dict[str, Any]:
        """What the file says of how it was found."""
        return {
            "command": self.command or "sphere.tuning.tune",
            "folder": str(self.folder),
            "layers": "given" if self.options.layers else "causal tracing",
            "trials": len(rows),
            "best_trial": best,
            "score": round(rows[best]["score"], 2),
            "score_of_the_start": round(rows[0]["score"], 2),
            "perplexity": round(rows[best]["perplexity"], 4),
            "dataset": self.config.ds_name,
            "case_ids": sorted(record.case_id for record in self.records),
            "seed": self.config.seed,
        }

    def _draw(self, drawn: Drawn) -> None:
        with drawing():
            files = {f"{drawn.name}.svg": svg(drawn), f"{drawn.name}.png": png(drawn)}
        for name, content in files.items():
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(content)


def _one_trial(search: Search, space: SearchSpace, trials: Objective) -> Outcome:
    """Suggest, edit and score, keep."""
    trial, params = search.next(space)
    hparams = space.hparams(params)
    stopped: list[Outcome] = []

    def go_on(outcome: Outcome) -> bool:
        if search.worth_going_on(trial, outcome.n_edits, outcome.value):
            return True
        stopped.append(outcome)
        return False

    outcome = trials.evaluate(hparams, go_on)
    note = {"numbers": space.numbers(hparams), "outcome": asdict(outcome)}
    search.finish(trial, outcome.value, bool(stopped), note)
    return outcome
