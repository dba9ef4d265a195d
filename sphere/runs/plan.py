"""The memory plan of a run, and what a batch costs, before anything is loaded (`sphere plan`).

The model is built from its configuration on the meta device, where tensors have shapes and no values. What its layers
compute and what they keep for the gradient is counted there, layer by layer, so that the plan knows no architecture.
docs/memory.md explains every line, and says how close the plan was where it was measured.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sphere.errors import SphereError
from sphere.evaluation.summary import format_lines
from sphere.forward.device_memory import GRADIENT_TOKENS
from sphere.forward.layers import LayerStack
from sphere.forward.packing import ROW_TOKENS
from sphere.forward.scorer import LOGIT_VALUES
from sphere.hparams import HParams, ModuleHParams, TargetHParams
from sphere.methods import Method, get_method
from sphere.models import DTYPES, meta_model, model_label, resolve_device
from sphere.rules import RuleSet
from sphere.runs.config import RunConfig
from sphere.runs.facts_file import n_edits_of
from sphere.runs.hparams import hparams_of, run_rules
from sphere.runs.ledger import ledger_bytes
from sphere.runs.memory import DEVICE, DISK, FLOAT32, HOST, PHASES, Item, Sizes
from sphere.runs.method_memory import memory_of
from sphere.runs.operation_counter import Counted, count, edited_shapes
from sphere.runs.rates import EIGH_FLOPS, measure_rates
from sphere.runs.resolve import alpha_of, beta_hse_of
from sphere.strength import AUTO

# Per request, means over CounterFact with the default model's tokenizer: rows in the optimisation of z, their tokens
# before and from the subject's last one on, scored tokens of a row; prefix tokens that are run (shared ones once).
ROWS, PREFIX, SUFFIX, SCORED, RUN_PREFIX = 6.5, 12.5, 4.5, 1.2, 20.0
PADDED_PREFIX = 20  # tokens before the subject's last one, as rows of a pass are padded
RANK_SHARE = 0.25  # principal directions, as a share of the smaller side
TARGET_VALUES = "target values"  # a stage of a batch


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs of a model.

    Attributes:
        vocabulary: number of logits.
        width: d, of the hidden states.
        bytes: of one value.
    """

    vocabulary: int
    width: int
    bytes: int
    counted: Counted

    @classmethod
    def of(cls, stack: LayerStack, counted: Counted) -> ModelShape:
        model: Any = stack.model
        width = model.get_input_embeddings().weight.shape[1]
        return cls(model.get_output_embeddings().weight.shape[0], width, model.dtype.itemsize, counted)


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        title: lines that say of what.
        items: everything that takes memory.
        flops: stage -> (kind of arithmetic, operations of one batch).
        merged: whether device and host are one memory.
        dtype: of the model.
    """

    title: tuple[str, ...]
    items: tuple[Item, ...]
    flops: tuple[tuple[str, str, float], ...]
    merged: bool
    dtype: torch.dtype

    def seconds(self, rates: Mapping[str, float]) -> float | None:
        """Of one batch, at the rates of `measure_rates`; None where not all of it is counted (no target values)."""
        if not any(stage == TARGET_VALUES for stage, _, _ in self.flops):
            return None
        return sum(operations / rates[kind] for _, kind, operations in self.flops)

    def peak(self, place: str) -> tuple[str, int]:
        """The phase in which most is held in a place, and how many bytes."""
        totals = self.totals(place)
        phase = max(totals, key=lambda p: totals[p])
        return phase, totals[phase]

    def totals(self, place: str) -> dict[str, int]:
        """Phase -> bytes held in a place."""
        places = {DEVICE, HOST} if self.merged and place != DISK else {place}
        return {
            phase: sum(item.size for item in self.items if item.place in places and item.alive(phase))
            for phase in PHASES
        }


def plan_run(
    config: RunConfig, known: dict[Hashable, Counted] | None = None, n_edits: int | None = None
) -> Plan:
    """The plan of a run.

    Args:
        known: what was counted of models for other plans; what is counted for this one is added.
        n_edits: of the whole run; None: the limit of a dataset, which need not be here; of one without a limit, and of
            one's own facts, as many as there are.

    Raises:
        SphereError: hyperparameters, a model configuration or facts that no run can be made of.
    """
    config.check()
    method = get_method(config.alg_name)
    hparams = hparams_of(config)
    rules, sphere = run_rules(config, hparams), bool(beta_hse_of(config))
    device = _device_type(config.device)
    model = meta_model(config.model_name, config.dtype, device)
    stack = LayerStack(model, hparams)
    if n_edits is None:
        n_edits = (config.dataset_size_limit if config.facts is None else None) or n_edits_of(config)
    sizes = Sizes(
        edited=edited_shapes(stack),
        weight_bytes=model.dtype.itemsize,
        moment_bytes=DTYPES[hparams.mom2_dtype].itemsize if isinstance(hparams, HParams) else 0,
        n_edits=n_edits,
        num_edits=min(config.num_edits, n_edits),
        conserve_memory=config.conserve_memory,
        on_cpu=device == "cpu",
    )
    optimised = isinstance(hparams, TargetHParams)
    first = max(hparams.layers) + 1 if optimised else min(hparams.layers)
    last = getattr(hparams, "v_loss_layer", stack.n_layers - 1)
    known = {} if known is None else known
    part = (config.model_name, model.dtype, device, hparams.layer_module_tmp, first, last)
    if part not in known:
        known[part] = count(stack, first, last)
    shape = ModelShape.of(stack, known[part])
    most = GRADIENT_TOKENS.get(device, GRADIENT_TOKENS["cpu"])
    items = [
        *_weights(model, sizes, sphere and alpha_of(config) == AUTO),
        *memory_of(method).items(hparams, sizes),
        *_passes(method, hparams, shape, sizes, config.batch_tokens or most),
        *_writing(sizes, sphere),
        *_scoring(shape, sizes, config.passes.scoring_tokens(device)),
        *_files(sizes),
        _ledger(config, method, rules, sizes),
    ]
    return Plan(
        title=_title(config, stack, sizes, device),
        items=tuple(item for item in items if item.size),
        flops=tuple(_operations(method, hparams, shape, sizes, sphere)),
        merged=sizes.on_cpu,
        dtype=model.dtype,
    )


def _device_type(device: str) -> str:
    """ "cpu" or "cuda"; the device need not be here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    return "cuda" if kind == "cuda" else resolve_device(device).type


def _title(config: RunConfig, stack: LayerStack, sizes: Sizes, device: str) -> tuple[str, ...]:
    model: Any = stack.model
    parameters = sum(p.numel() for p in model.parameters())
    shapes = ", ".join(dict.fromkeys(f"{out} x {in_features}" for out, in_features in sizes.edited))
    return (
        f"{model_label(config.model_name)} ({type(model).__name__}): {parameters / 1e9:.2f} billion parameters in "
        f"{str(model.dtype).removeprefix('torch.')}, {stack.n_layers} layers, {len(sizes.edited)} edited ({shapes})",
        f"{config.alg_name}: {sizes.n_edits} edits in batches of {sizes.num_edits}, "
        f"{config.passes.editing_tokens} tokens in a forward pass, on {device}"
        f"{', --conserve_memory' if sizes.conserve_memory else ''}",
    )


# ---- memory that every run takes ----


def _at(phase: str, what: str, formula: str, size: float) -> Item:
    """Something on the device in one phase."""
    return Item(what, formula, int(size), DEVICE, phase, phase)


def _weights(model: nn.Module, sizes: Sizes, auto: bool) -> list[Item]:
    total = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    exact = sizes.exact_bytes * sizes.entries
    masters = FLOAT32 * sizes.entries if sizes.weight_bytes < FLOAT32 else 0
    copy = exact if auto and sizes.offload_device != DEVICE else 0
    return [
        Item("model weights", "P b", total, DEVICE),
        Item("float32 masters of edited weights", "4 E", masters, DEVICE),
        Item("edited weights as they were at first", "4 E", exact, sizes.offload_device),
        Item("the same, for alpha auto", "4 E", copy, DEVICE),
        Item(
            "edited weights before the batch", "4 E", exact, sizes.offload_device, "target values", "writing"
        ),
    ]


def _passes(
    method: type[Method], hparams: ModuleHParams, shape: ModelShape, sizes: Sizes, batch_tokens: int
) -> list[Item]:
    """Forward and backward passes of a batch."""
    counted, phase = shape.counted, "target values"
    if not isinstance(hparams, TargetHParams):  # a gradient of the weights, in batches of requests
        n = min(getattr(hparams, "batch_size", sizes.num_edits), sizes.num_edits)
        tokens, points = n * (PREFIX + SUFFIX), n * SCORED
        return [
            _at(phase, "saved for the gradient", "t a", tokens * counted.saved),
            _at(phase, "logits and their gradient", "16 s V", 16 * points * shape.vocabulary),
        ]
    n = min(method.at_once or sizes.num_edits, sizes.num_edits)
    tokens = min(batch_tokens, n * ROWS * SUFFIX)
    points = min(tokens / SUFFIX, n * ROWS) * (SCORED + 1 / ROWS)
    constant = n * (RUN_PREFIX + ROWS * PADDED_PREFIX)
    rows = n * ROWS * (PREFIX + SUFFIX)
    return [
        _at(phase, "saved for the gradient of one pass", "t a", tokens * counted.saved),
        _at(phase, "logits of one pass and their gradient", "16 s V", 16 * points * shape.vocabulary),
        _at(phase, "first distributions of the KL term", "4 n V", FLOAT32 * n * shape.vocabulary),
        _at(phase, "attention keys and values of prefixes", "n (20 + 6.5 x 20) c", constant * counted.kv),
        _at(
            "solve",
            "hidden states on their way to the keys",
            "6.5 n x 17 d b",
            rows * shape.width * shape.bytes,
        ),
    ]


def _writing(sizes: Sizes, sphere: bool) -> list[Item]:
    """One weight's update on its way through the rules, and SPHERE's decomposition of the weight."""
    out, in_features = _largest(sizes)
    phase = "writing"
    items = [
        _at(phase, "an update, in float64 and as it is written", "(8 + 2 x 4) out in", 16 * out * in_features)
    ]
    return [*items, _directions(phase, sizes)] if sphere else items


def _largest(sizes: Sizes) -> tuple[int, int]:
    """(out, in) of the largest edited weight."""
    return max(sizes.edited, key=lambda pair: pair[0] * pair[1])


def _directions(phase: str, sizes: Sizes) -> Item:
    """The principal directions of one weight."""
    out, in_features = _largest(sizes)
    side = min(out, in_features)
    size = FLOAT32 * (4 * side**2 + side * in_features)
    return _at(phase, "principal directions and their making", "4 (4 m^2 + m in)", size)


def _scoring(shape: ModelShape, sizes: Sizes, tokens: int) -> list[Item]:
    phase = "scoring"
    masters = FLOAT32 if sizes.weight_bytes < FLOAT32 else 0
    layer = shape.counted.saved / shape.counted.layers
    masks = ROW_TOKENS * (shape.bytes + 1)
    logits = min(LOGIT_VALUES, tokens * shape.vocabulary) * shape.bytes
    return [
        Item(
            "edited weights to be put back",
            "4 E",
            sizes.exact_bytes * sizes.entries,
            sizes.offload_device,
            phase,
            phase,
        ),
        _at(phase, "masters beside those of the run", "4 E", masters * sizes.entries),
        _directions(phase, sizes),
        _at(
            phase,
            "one layer's activations, and masks",
            "t (a / layers + 256 (b + 1))",
            tokens * (layer + masks),
        ),
        _at(phase, "logits", "2^27 b", logits),
    ]


def _files(sizes: Sizes) -> list[Item]:
    kept = 3 * sizes.weight_bytes * sizes.entries
    return [
        Item("checkpoints: original, first and last batch", "3 E b", kept, DISK),
        Item(
            "resume point, twice while it is replaced",
            "2 x 4 E",
            2 * sizes.exact_bytes * sizes.entries,
            DISK,
        ),
    ]


def _ledger(config: RunConfig, method: type[Method], rules: RuleSet, sizes: Sizes) -> Item:
    sums = method.factors is not Method.factors and all(hasattr(rule, "factored") for rule in rules.each)
    formula = "4 N (out + in)" if sums else "4 E per batch"
    return Item("ledger of what edits added", formula, ledger_bytes(config, sums, sizes), DISK)


# ---- operations of a batch ----


def _operations(
    method: type[Method], hparams: ModuleHParams, shape: ModelShape, sizes: Sizes, sphere: bool
) -> list[tuple[str, str, float]]:
    """(stage, kind of arithmetic, operations) of one batch; of methods without target values SPHERE's only."""
    n, counted = sizes.num_edits, shape.counted
    stages: list[tuple[str, str, float]] = []
    if isinstance(hparams, TargetHParams):
        suffix, scored = n * ROWS * SUFFIX, n * (ROWS * SCORED + 1)
        step = suffix * (counted.forward + counted.backward) + 2 * scored * counted.head
        once = (suffix + n * RUN_PREFIX) * counted.below + n * RUN_PREFIX * counted.forward
        stages.append((TARGET_VALUES, "model", hparams.v_num_grad_steps * step + once))
        stages.append(("keys and residuals", "model", n * ROWS * (PREFIX + 1) * counted.below))
        stages.append(("solve", "float64", memory_of(method).solve_operations(hparams, sizes)))
    if sphere:
        small = [min(shape) for shape in sizes.edited]
        passes = 1 + 6 * RANK_SHARE  # the Gram matrix's triangle; the basis, the projection and its figures
        dense = sum(
            passes * s * out * in_features for s, (out, in_features) in zip(small, sizes.edited, strict=True)
        )
        stages.append(("principal directions: products", "float32", dense))
        stages.append(("principal directions: eigenvectors", "eigh", sum(EIGH_FLOPS * s**3 for s in small)))
    return stages


# ---- in words ----


def describe_run(config: RunConfig) -> str:
    """The plan of a run for a terminal, with times where its device is here to be measured."""
    plan = plan_run(config)
    try:
        device = str(resolve_device(config.device))
    except SphereError:
        return format_plan(plan)
    return format_plan(plan, measure_rates(device, plan.dtype))


def format_plan(plan: Plan, rates: Mapping[str, float] | None = None) -> str:
    """The plan for a terminal.

    Args:
        rates: of `measure_rates`; without them no times are given.
    """
    lines = [["what", "where", "GiB", "bytes", "while"]]
    for item in plan.items:
        where = HOST if plan.merged and item.place == DEVICE else item.place
        lines.append([item.what, where, _gib(item.size), item.formula, _span(item)])
    parts = ["\n".join(plan.title), format_lines(lines)]
    for place in (HOST, DISK) if plan.merged else (DEVICE, HOST, DISK):
        phase, most = plan.peak(place)
        by_phase = ", ".join(f"{p} {_gib(size)}" for p, size in plan.totals(place).items())
        parts.append(f"{place}: {_gib(most)} GiB at most, at {phase} ({by_phase})")
    lines, total = [["one batch", "operations", "seconds"]], 0.0
    for stage, kind, operations in plan.flops:
        seconds = operations / rates[kind] if rates else None
        total += seconds or 0.0
        lines.append([stage, f"{operations:.2e}", "-" if seconds is None else f"{seconds:.2f}"])
    if rates:
        lines.append(["together, at the measured rates", "", f"{total:.2f}"])
        shown = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in rates.items())
        parts.append(format_lines(lines) + f"\n\nmeasured here, in 10^9 operations/s: {shown}")
    else:
        parts.append(format_lines(lines) + "\n\nno times: the device is not here")
    return "\n\n".join(parts)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _span(item: Item) -> str:
    if (item.since, item.until) == (PHASES[0], PHASES[-1]):
        return "always"
    return item.since if item.since == item.until else f"{item.since} to {item.until}"
