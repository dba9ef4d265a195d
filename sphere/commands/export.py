"""Write the edited model of a run in a form that other programs load, and check it.

    sphere export RUN --to hf OUT      a folder for transformers and vLLM
    sphere export RUN --to peft OUT    a LoRA adapter
    sphere export RUN --to gguf OUT    for llama.cpp

OUT is a new folder; nothing is written over. What was written is loaded again and compared with the edited model on 20
prompts, and the largest difference is printed, before OUT gets its name. A model card (README.md) says what was edited,
how, with which scores, and from which model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sphere.commands.common import add_settings, make_parser, positive_int


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere export")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, as `sphere edit` wrote it")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to be made")
    parser.add_argument(
        "--to",
        choices=("hf", "peft", "gguf"),
        default="hf",
        help="hf: a folder of safetensors, for transformers and vLLM; peft: a LoRA adapter for these; gguf, for "
        "llama.cpp: the file that the model came as with the edited tensors replaced, or a LoRA adapter",
    )
    parser.add_argument(
        "--checkpoint",
        type=int,
        default=None,
        metavar="N",
        help="the weights after N edits; 0: the unedited model (default: the last)",
    )
    parser.add_argument(
        "--dtype",
        default=None,
        help="hf, peft: float32, bfloat16 or float16 (default: as the model was edited; float32 for adapters)",
    )
    parser.add_argument(
        "--shard_size", default=None, metavar="SIZE", help="hf: the largest size of a file (default: 5GB)"
    )
    parser.add_argument(
        "--rank",
        type=positive_int,
        default=None,
        help="of an adapter: the best adapter of this rank (default: the edits' own rank, which is exact)",
    )
    parser.add_argument(
        "--quant",
        default=None,
        help="gguf: type of the edited tensors, e.g. f16 or q8_0 (default: their own in the file; f32 for adapters)",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="gguf: a LoRA adapter although the model came as GGUF"
    )
    add_settings(
        parser,
        ("model_name", "device", "device_map"),
        model_name={
            "default": None,
            "help": "the unedited model, where it is no longer where the run found it",
        },
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, export, print."""
    args = parser().parse_args(argv)
    from sphere.export import ExportOptions, export_run

    export = export_run(
        args.run,
        args.to,
        args.out,
        ExportOptions(
            dtype=args.dtype,
            shard_size=args.shard_size,
            rank=args.rank,
            quant=args.quant,
            adapter=args.adapter,
        ),
        checkpoint=args.checkpoint,
        model_name=args.model_name,
        device=args.device,
        device_map=args.device_map,
    )
    print("\n".join([*export.made, *export.comparison.lines()]))
    print(f"\n{args.to}, after {export.n_edits} edits: {export.folder}")
    return 0
