"""What every command line shares: errors as one sentence, logging beside progress bars, the common flags.

Knows argparse and exit codes. It knows nothing of models, data or methods, and imports none of them, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from sphere.errors import SphereError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

WIDTH = 112  # of help texts, where the terminal is wide enough or unknown
DATASETS = ("starter", "cf", "mcf", "zsre")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks; shows each default that says something, and short names for values."""

    def __init__(self, prog: str, **options: Any) -> None:
        columns = shutil.get_terminal_size(fallback=(WIDTH, 24)).columns
        super().__init__(prog, **{"max_help_position": 34, "width": min(columns, WIDTH) - 2, **options})

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (int, positive_int):
            return "N"
        return "X" if action.type is float else action.dest.rpartition("_")[2].upper()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one `error: ...` line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"error: {message.rstrip('.')}; see --help.\n")


def make_parser(description: str | None, **options: Any) -> Parser:
    """A parser for one command; `description` is usually the script's docstring."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None:
        options.setdefault("prog", f"python -m {module.name}")
    return Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)


def positive_int(text: str) -> int:
    """The type of a flag that counts something: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return value


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model_name, --device, --dtype, --device_map: the arguments of `sphere.models.load_model`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name",
        default="SmolLM2-135M",
        help="the embedded default model, a folder, a .gguf file or a Hugging Face hub id",
    )
    group.add_argument(
        "--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ..."
    )
    group.add_argument(
        "--dtype",
        default="auto",
        help="auto (float32 on CPU, the checkpoint's own on a GPU), float32, bfloat16, float16 or float64",
    )
    group.add_argument(
        "--device_map", default=None, help="spread the layers over devices, e.g. auto; overrides --device"
    )


def add_data_flags(
    parser: argparse.ArgumentParser, ds_name: str | None = "starter", limit: int | None = None
) -> None:
    """--ds_name, --data_dir, --dataset_size_limit (default `limit`): what `load_records` takes."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--ds_name",
        choices=DATASETS,
        default=ds_name,
        help="starter (embedded), cf (CounterFact), mcf (the part of it that MEMIT uses) or zsre",
    )
    group.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        help="folder with the published files; cf, mcf and zsre are downloaded into it when missing",
    )
    group.add_argument(
        "--dataset_size_limit",
        type=positive_int,
        default=limit,
        help="use only the first so many records" + ("" if limit else " (default: all)"),
    )


class _ProgressHandler(logging.Handler):
    """Writes log lines to stderr without tearing progress bars apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(level: int = logging.INFO) -> None:
    """Log lines of this package to stderr, between progress bars; other libraries only their errors."""
    handler = _ProgressHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sphere").setLevel(level)
    for noisy in ("transformers", "httpx", "urllib3", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_cli(main: Callable[[list[str] | None], int | None]) -> NoReturn:
    """Run a script's `main` and exit: 0 (or what it returns), 2 after an `error: ...` line, 130 on Ctrl-C.

    Other exceptions are bugs and keep their traceback.
    """
    set_up_logging()
    _end_at_a_second_interrupt()
    try:
        code = main(None)
    except SphereError as error:
        code = _complain(str(error))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except OSError as error:
        code = _complain(_os_sentence(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, named so as not to import it here
            raise
        code = _complain(
            "The GPU's memory is full: use a smaller --batch_tokens or --num_edits, --conserve_memory or --dtype "
            "bfloat16; what is written so far is kept, and --continue_from_run goes on from it."
        )
    sys.exit(code or 0)


def _end_at_a_second_interrupt() -> None:
    """Ctrl-C once ends the command in good order; once more, meanwhile, ends it at once: files are whole anyway."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
        return
    interrupted = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            os.write(2, b"\nInterrupted again: ended at once.\n")  # print could have been interrupted itself
            os._exit(EXIT_INTERRUPTED)
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def _complain(sentence: str) -> int:
    """Print an error as one line of its own. One process of several does: it is an error of all of them."""
    for bar in list(getattr(tqdm, "_instances", ())):  # left open by the error
        bar.close()
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return EXIT_ERROR


def _os_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    what = f"{error.strerror or error}{where}"
    if error.errno == errno.ENOSPC:
        return f"{what}: free some space, or choose another folder with --output_dir or --data_dir."
    return f"{what}: check that the path exists and may be read and written."
