"""Ask the unedited and the edited model, side by side.

    sphere ask RUN "The mother tongue of Danielle Darrieux is" --targets English French
    sphere ask RUN --prompts facts.csv
    sphere ask RUN

For each prompt: what each model says (greedily, unless there is a --temperature), its likeliest next tokens, and the
probability of each target behind the prompt. RUN is a run's folder, the folder of an exported model or LoRA adapter, or
a .gguf file; an export is asked beside the model that it names as its base (or --model_name). Without a prompt, prompts
are read line by line, from a prompt line or from a pipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from sphere.commands.common import MODEL_FLAGS, add_settings, make_parser, positive_int

if TYPE_CHECKING:
    from sphere.answers import Asked, AskOptions, Question
    from sphere.evaluation.run_model import ModelOptions


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = make_parser(__doc__, "sphere ask")
    parser.add_argument("run", metavar="RUN", help="a run's folder, an export's folder or a .gguf file")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to continue")
    parser.add_argument(
        "--checkpoint",
        type=int,
        default=None,
        metavar="N",
        help="the run's state after N edits (default: its last)",
    )
    add_asking_flags(parser)
    return parser


def add_asking_flags(parser: argparse.ArgumentParser) -> None:
    """Prompts, how they are asked, and the model's flags."""
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts, one on each line, or a table of facts (.csv, .tsv, .json, .jsonl), asked with their answers",
    )
    parser.add_argument(
        "--targets", metavar="TEXT", nargs="+", default=(), help="say how likely these are behind each prompt"
    )
    parser.add_argument("--n_tokens", type=positive_int, default=20, help="length of a continuation")
    parser.add_argument(
        "--n_next", type=positive_int, default=5, help="how many of the likeliest tokens are shown"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token at each step; above 0: drawn"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    add_settings(
        parser,
        (*MODEL_FLAGS, "seed", "chat_template"),
        model_name={
            "default": None,
            "help": "the unedited model (default: what the run or the model's card names)",
        },
        dtype={"help": "auto (that of the run), float32, bfloat16, float16 or float64"},
        seed={"help": "of what a temperature above 0 draws"},
        chat_template={"help": "put prompts into the user's turn of the tokenizer's chat template"},
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, ask, print."""
    args = parser().parse_intermixed_args(argv)
    from sphere.answers import questions_of
    from sphere.evaluation.ask_run import open_source

    options, told = asking_options(args), prompts_of(args)
    if told:
        questions_of(told, args.targets)  # what is wrong with them is said before a model is loaded
    source = open_source(args.run, model_options(args), args.checkpoint)
    for questions in [told] if told else _lines():
        for asked in source.ask(questions_of(questions, args.targets), options):
            show(asked, args.json)
    return 0


def prompts_of(args: argparse.Namespace) -> list[str | Question]:
    """The prompts of the command line and of the file that it names."""
    from sphere.evaluation.ask_run import read_questions

    given: list[str | Question] = list(getattr(args, "prompt", ()))
    return [*given, *read_questions(args.prompts)] if args.prompts else given


def asking_options(args: argparse.Namespace) -> AskOptions:
    """How models are asked, of the flags of `add_asking_flags`."""
    from sphere.answers import AskOptions

    return AskOptions(
        n_tokens=args.n_tokens, n_next=args.n_next, temperature=args.temperature, seed=args.seed
    )


def model_options(args: argparse.Namespace) -> ModelOptions:
    """How models are loaded, of the same flags."""
    from sphere.evaluation.run_model import ModelOptions

    return ModelOptions(
        model_name=args.model_name,
        device=args.device,
        dtype=args.dtype,
        device_map=args.device_map,
        chat_template=args.chat_template,
    )


def show(asked: Asked, as_json: bool) -> None:
    """Print the answers to one prompt."""
    from sphere.evaluation.ask_table import format_asked, to_json

    text = json.dumps(to_json(asked), ensure_ascii=False) if as_json else format_asked(asked)
    print(text, flush=True)


def _lines() -> Iterator[list[str | Question]]:
    """Prompts as they come: from the prompt line until the end of input, or all lines of a pipe at once."""
    if not sys.stdin.isatty():
        yield [line for line in sys.stdin.read().splitlines() if line.strip()]
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (input() has a history and can be edited with it)
    print("Write a prompt, Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield [line]
