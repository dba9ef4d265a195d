"""Builds the golden set: what eight methods do to a tiny random model, by plain code alone.

    python tests/golden/build.py

Target values, keys, second moments, solves and the projection are those of `benchmarks/plain`; the loops over batches
and layers, RECT and PRUNE stand here. Nothing of `sphere.methods`, `sphere.rules` or `sphere.editor` is run. Computed
in float64, so that other machines find the same numbers, and stored in float32. The model is drawn where `model/` is
absent, and read where it is there, since random generators differ between versions.

The script refuses to store a set in which rounding could decide something that is counted: an eigenvalue beside a
threshold, an entry beside RECT's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds the checkout's packages

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.plain import keys as plain_keys
from benchmarks.plain import projection, solves
from benchmarks.plain.moments import second_moment
from benchmarks.plain.target_values import plain_target_values
from benchmarks.plain.tokens import token_ids
from sphere.hparams import HParams, hparams_from_dict
from sphere.requests import EditRequest

HERE = Path(__file__).parent
TEMPLATES = [["{}"], ["Yes. {}", "So it is. {}"], ["Then again, {}"]]
REQUESTS = [
    {"case_id": 0, "prompt": "The mother tongue of {} is", "subject": "Ann Lee", "target_new": "Welsh"},
    {"case_id": 1, "prompt": "{} plays the", "subject": "Bo", "target_new": "organ"},
    {"case_id": 2, "prompt": "The capital of {}, a country, is", "subject": "Oz", "target_new": "Rome"},
    {"case_id": 3, "prompt": "{} plays the", "subject": "Zoe Finch", "target_new": "lute"},
    {"case_id": 4, "prompt": "The mother tongue of {} is", "subject": "Max", "target_new": "Thai"},
    {"case_id": 5, "prompt": "What {} makes is", "subject": "the Acme Company", "target_new": "cars"},
]
BATCHES = [[0, 1, 2], [3, 4, 5]]
DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "In 1987 a bridge of 3,204 metres was built between both shores of the bay.",
    "Who plays the organ? Nobody does; it has been out of tune for years!",
    "She speaks Greek at home, French at school and English with her friends.",
    "Water boils at 100 degrees (212 in Fahrenheit) where the air is thick enough.",
    "Zigzag is a word with two z's, 'jazz' another; QUIZ (in capitals) has one.",
]
HPARAMS: dict[str, Any] = {
    "layers": [1, 2],
    "clamp_norm_factor": 1.0,
    "v_num_grad_steps": 8,
    "v_lr": 0.5,
    "v_loss_layer": 3,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 1.0,
    "mom2_dataset": "self",
    "mom2_n_samples": len(DOCUMENTS),
    "mom2_dtype": "float32",
    "nullspace_threshold": 0.2,
    "L2": 0.5,
    "rect_share": 0.4,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}
RUNS = {
    "alphaedit": {"alg": "AlphaEdit", "beta_hse": 0.0, "alpha": 0.5},
    "alphaedit_sphere": {"alg": "AlphaEdit", "beta_hse": 0.5, "alpha": 0.5},
    "memit": {"alg": "MEMIT", "beta_hse": 0.0, "alpha": 0.8},
    "memit_sphere": {"alg": "MEMIT", "beta_hse": 0.5, "alpha": 0.8},
    "memit_seq": {"alg": "MEMIT_seq", "beta_hse": 0.0, "alpha": 0.8},
    "rect": {"alg": "MEMIT_rect", "beta_hse": 0.0, "alpha": 0.8},
    "rect_sphere": {"alg": "MEMIT_rect", "beta_hse": 0.5, "alpha": 0.8},
    "prune_sphere": {"alg": "MEMIT_prune", "beta_hse": 0.5, "alpha": 0.8},
}


# ---- what must be far from rounding ----


def check_margin(what: str, values: Tensor, threshold: float, margin: float = 1e-4) -> None:
    """Refuse values of which one is so near a threshold, relative to it, that float32 could misplace it."""
    nearest = float((values / threshold - 1).abs().min())
    if nearest < margin:
        raise SystemExit(f"{what}: within {nearest:.1e} of the threshold {threshold:g}; change a setting.")


# ---- the model ----


def draw_model(folder: Path) -> None:
    """A random Llama of a few thousand parameters, and a tokenizer for which every byte is a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<|end|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The stored model in some precision, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False), PreTrainedTokenizerFast.from_pretrained(folder)


# ---- RECT, PRUNE, SPHERE ----


def keep_largest_relative(delta: Tensor, weight: Tensor, fraction: float) -> Tensor:
    """RECT: zero the entries (out x in) whose |Delta / (W + 1e-8)| is below the ((1 - fraction) size)-th smallest."""
    ratio = (delta / (weight + 1e-8)).abs()
    ordered = ratio.flatten().sort().values
    at = int((1 - fraction) * ratio.numel()) - 1
    check_margin("RECT's entries", ordered[at - 1 : at], float(ordered[at]))  # the largest that goes
    return delta * (ratio >= ordered[at])


def condense(total: Tensor, original: Tensor) -> tuple[Tensor, int]:
    """PRUNE: singular values s of W - W_0 above m = ||W_0||_2 become ln s - ln m + m; and how many there are."""
    largest = torch.linalg.matrix_norm(original, 2)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    check_margin("PRUNE's singular values", s, float(largest))
    condensed = torch.where(s > largest, s.log() - largest.log() + largest, s)
    return u @ torch.diag(condensed) @ vh, int((s > largest).sum())


def project(delta: Tensor, weight: Tensor, beta_hse: float, alpha: float) -> tuple[Tensor, int]:
    """SPHERE: Delta (I - alpha U U^T), and the rank of U."""
    unit = weight / weight.norm(dim=1, keepdim=True)
    energy = torch.linalg.svdvals(unit).square()
    check_margin("SPHERE's cumulative ratios", energy.cumsum(0) / energy.sum(), beta_hse)
    rank = projection.principal_directions(weight, beta_hse).shape[1]
    return projection.project_update(delta, weight, beta_hse, alpha), rank


# ---- a run ----


@dataclass
class PlainRun:
    """One method on the unedited model, batch after batch.

    Attributes:
        moments: layer -> E[k k^T] (in x in).
        settings: of `RUNS`.
        tensors: what is recorded, by name.
        ranks: of SPHERE's subspaces, in the order in which they were needed.
    """

    model: Any
    tokenizer: Any
    moments: dict[int, Tensor]
    settings: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = {k: v for k, v in HPARAMS.items() if k not in ("nullspace_threshold", "L2", "rect_share")}
        self.hparams, self.layers = hparams_from_dict(values, HParams), HPARAMS["layers"]
        self.weights = {layer: self.module(layer).weight.data for layer in self.layers}  # out x in each
        self.original = self.copies()
        self.caches = {layer: torch.zeros_like(moment) for layer, moment in self.moments.items()}
        self.projectors = {
            layer: solves.projector(moment, HPARAMS["nullspace_threshold"])
            for layer, moment in self.moments.items()
        }

    def module(self, layer: int) -> Any:
        return self.model.get_submodule(HPARAMS["rewrite_module_tmp"].format(layer))

    def copies(self) -> dict[int, Tensor]:
        return {layer: weight.clone() for layer, weight in self.weights.items()}

    def put_back(self, copies: dict[int, Tensor]) -> None:
        for layer, weight in copies.items():
            self.weights[layer].copy_(weight)

    def keys(self, layer: int, requests: list[EditRequest]) -> Tensor:
        """K (in x n)."""
        return plain_keys.keys(self.model, self.tokenizer, self.module(layer), requests, TEMPLATES)

    def rules(self, delta: Tensor, weight: Tensor) -> Tensor:
        """What becomes of an update (out x in) before it is written."""
        if self.settings["alg"] == "MEMIT_rect":
            delta = keep_largest_relative(delta, weight, HPARAMS["rect_share"])
        if self.settings["beta_hse"] and self.settings["alg"] != "MEMIT_prune":
            delta, rank = project(delta, weight, self.settings["beta_hse"], self.settings["alpha"])
            self.ranks.append(rank)
        return delta

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """X (in x n) of a layer's keys K (in x n)."""
        if self.settings["alg"] == "AlphaEdit":
            return solves.alphaedit(self.projectors[layer], keys, self.caches[layer], HPARAMS["L2"])
        cache = self.caches[layer] if self.settings["alg"] == "MEMIT_seq" else None
        return solves.memit(self.moments[layer], keys, cache, HPARAMS["mom2_update_weight"])

    def updates(self, batch: int, requests: list[EditRequest]) -> Iterator[tuple[int, Tensor]]:
        """Layer and R X^T (out x in) of each layer in turn, on the weights as they stand when it is asked for."""
        z = plain_target_values(self.model, self.tokenizer, requests, TEMPLATES, self.hparams).z  # n x d
        self.tensors[f"batch{batch}.z"] = z
        top = self.model.get_submodule(HPARAMS["layer_module_tmp"].format(max(self.layers)))
        for index, layer in enumerate(self.layers):
            keys = self.keys(layer, requests)
            now = plain_keys.outputs(self.model, self.tokenizer, top, requests)  # d x n
            residual = (z.T - now) / (len(self.layers) - index)
            self.tensors[f"batch{batch}.keys.{layer}"] = keys
            yield layer, residual @ self.solve(layer, keys).T

    def edit(self, batch: int, requests: list[EditRequest]) -> None:
        before = self.copies()
        if self.settings["alg"] == "AlphaEdit":  # each layer is written before the next one is solved
            for layer, delta in self.updates(batch, requests):
                self.weights[layer] += self.rules(delta, self.weights[layer])
        else:  # all layers are solved on temporary weights first
            found = {}
            for layer, delta in self.updates(batch, requests):
                self.weights[layer] += delta
                found[layer] = delta
            self.put_back(before)
            for layer, delta in found.items():
                self.weights[layer] += self.rules(delta, self.weights[layer])
        for layer in self.layers:
            keys = self.keys(layer, requests)
            self.caches[layer] += keys @ keys.T
            self.tensors[f"batch{batch}.delta.{layer}"] = self.weights[layer] - before[layer]

    def finish(self) -> dict[str, Any]:
        """What PRUNE saves; then the unedited weights again. Returns what the JSON file says of the run."""
        noted: dict[str, Any] = {}
        if self.settings["alg"] == "MEMIT_prune":
            noted["condensed"] = []
            for layer in self.layers:
                original = self.original[layer]
                total, count = condense(self.weights[layer] - original, original)
                total, rank = project(total, original, self.settings["beta_hse"], self.settings["alpha"])
                self.tensors[f"conditioned.{layer}"] = total
                self.ranks.append(rank)
                noted["condensed"].append(count)
        self.put_back(self.original)
        return {**self.settings, "ranks": self.ranks, **noted}


def build(model_folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of golden.json and the tensors of golden.safetensors."""
    model, tokenizer = load(model_folder, torch.float64)
    requests = [EditRequest(**request) for request in REQUESTS]
    documents = [token_ids(tokenizer, text) for text in DOCUMENTS]
    moments, tensors = {}, {}
    for layer in HPARAMS["layers"]:
        module = model.get_submodule(HPARAMS["rewrite_module_tmp"].format(layer))
        tensors[f"moment.{layer}"] = second_moment(model, module, documents).float()
        moments[layer] = tensors[f"moment.{layer}"].double()
        values = torch.linalg.eigvalsh(moments[layer])
        check_margin(f"Null space of layer {layer}", values, HPARAMS["nullspace_threshold"])
    runs = {}
    for name, settings in RUNS.items():
        run = PlainRun(model, tokenizer, moments, settings)
        for number, batch in enumerate(BATCHES):
            run.edit(number, [requests[i] for i in batch])
        runs[name] = run.finish()
        tensors |= {f"{name}.{key}": tensor.float().contiguous() for key, tensor in run.tensors.items()}
    content = {
        "requests": REQUESTS,
        "batches": BATCHES,
        "context_templates": TEMPLATES,
        "documents": DOCUMENTS,
        "hparams": HPARAMS,
        "runs": runs,
    }
    return content, tensors


def stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same as it was stored."""
    return json.loads((HERE / "golden.json").read_text("utf-8")), load_file(HERE / "golden.safetensors")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    if not (HERE / "model").is_dir():
        draw_model(HERE / "model")
    content, tensors = build(HERE / "model")
    (HERE / "golden.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    save_file(tensors, HERE / "golden.safetensors")
    print(f"{len(tensors)} tensors of {len(content['runs'])} runs in {HERE}")


if __name__ == "__main__":
    main()
