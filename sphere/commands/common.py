"""What every command line shares: errors as one sentence, logging beside progress bars, the common flags.

Knows argparse, exit codes and the settings of a run. It knows nothing of models, data or methods, and imports none of
them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm.auto import tqdm

from sphere.errors import SphereError
from sphere.runs.config import RunConfig, Setting, limit_by_default, settings

if TYPE_CHECKING:
    from sphere.evaluation.answer_metrics import AnswerOptions

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

WIDTH = 112  # of help texts, where the terminal is wide enough or unknown


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


def make_parser(description: str | None, prog: str | None = None) -> Parser:
    """A parser for one command.

    Args:
        description: usually the module's docstring.
        prog: the command's name, e.g. "sphere edit"; where a module is run by its own name, that counts.
    """
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and not module.name.endswith("__main__"):
        prog = f"python -m {module.name}"
    return Parser(prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def positive_int(text: str) -> int:
    """The type of a flag that counts something: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return value


GROUPS = ("editing", "model", "data", "output", "scoring", "machine")  # of flags, in the order of `--help`
MODEL_FLAGS = ("model_name", "device", "dtype", "device_map")
MOST_IN_BRACES = 6  # choices of a flag that fit a line of its usage
DATA_FLAGS = ("ds_name", "data_dir", "dataset_size_limit")
Groups = dict[str, argparse._ArgumentGroup]


def add_settings(
    parser: argparse.ArgumentParser, names: Iterable[str] | None = None, **changed: Any
) -> Groups:
    """Flags made of the fields of `RunConfig`.

    Args:
        names: which ones (default: all).
        changed: field -> its attributes that are others here, e.g. {"seed": {"help": "of the bootstrap intervals"}}.

    Returns:
        Name -> group of flags, for what else belongs there.
    """
    chosen = [setting for name, setting in settings().items() if names is None or name in names]
    present = {setting.group for setting in chosen}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if names is None or name in present}
    for setting in chosen:
        _add_flag(groups[setting.group], replace(setting, **changed.get(setting.name, {})))
    return groups


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    spelled = [f"--{name}" for name in (setting.name, *setting.old_names)]
    if setting.kind is bool:
        group.add_argument(*spelled, action="store_true", help=setting.help)
        return
    kind: Callable[[str], Any] = positive_int if setting.at_least == 1 else setting.kind
    options: dict[str, Any] = {"choices": setting.choices} if setting.choices else {}
    if setting.words:
        kind, options["metavar"] = _reader(setting), "|".join(("X", *setting.words))
    text = setting.help
    if setting.choices and len(setting.choices) > MOST_IN_BRACES:
        options["metavar"] = "NAME"
        text = f"{text}; one of {', '.join(setting.choices)}"
    group.add_argument(*spelled, dest=setting.name, type=kind, default=setting.default, help=text, **options)


def _reader(setting: Setting) -> Callable[[str], Any]:
    """The type of a flag that may be a word in place of a number."""

    def read(text: str) -> Any:
        try:
            return setting.read(text)
        except SphereError:
            raise argparse.ArgumentTypeError(f"expected {setting.expected}, got {text!r}") from None

    return read


def add_run_settings(parser: argparse.ArgumentParser) -> Groups:
    """All flags of a run, as `config_of` reads them."""
    limit = settings()["dataset_size_limit"]
    text = f"{limit.help} (default: {limit.default}; all of --facts)"
    return add_settings(parser, dataset_size_limit={"default": None, "help": text})


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The run that flags of `add_run_settings` or `add_settings` stand for; a command's own flags are left out."""
    values = {name: value for name, value in vars(arguments).items() if name in settings()}
    if "dataset_size_limit" in values and values["dataset_size_limit"] is None:  # not given
        values["dataset_size_limit"] = limit_by_default(values.get("facts"))
    return RunConfig(**values)


def given_settings(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """The settings of a run that a command line names, be they the defaults; those that it leaves out are left out."""
    left_out = object()
    found = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(settings(), left_out))))
    return {name: found[name] for name in settings() if found[name] is not left_out}


def add_scoring_flags(group: argparse._ArgumentGroup) -> None:
    """Which facts are scored, which of them text is generated for, and who judges it."""
    group.add_argument(
        "--scored_facts",
        type=int,
        default=0,
        help="score at most so many of the facts edited so far, drawn by the seed; 0: all",
    )
    group.add_argument(
        "--generation_test_interval",
        type=int,
        default=0,
        help="generate text for every so-many-th case in the order of editing, from the first; 0 or below: never",
    )
    group.add_argument("--skip_generation_tests", action="store_true", help="generate no text")
    group.add_argument(
        "--exact_match_facts",
        type=int,
        default=0,
        help="generate greedily after the rewrite prompts of so many facts, from the first that was edited, and ask "
        "whether the text is the new target; 0: of none",
    )
    group.add_argument(
        "--generated_facts",
        type=int,
        default=0,
        help="ask about so many facts, from the first that was edited, as a user does: greedy text to a stop after "
        "rewrite, paraphrase and further prompts, compared with the answer; 0: about none",
    )
    group.add_argument(
        "--judge",
        metavar="CMD",
        default=None,
        help="a program that judges these answers too: it reads a line of JSON for each (prompt, answer, targets) and "
        "writes true, false or a number from 0 to 1 on a line",
    )
    group.add_argument(
        "--judge_seconds", type=float, default=120.0, help="how long the judge may take for one answer"
    )


def answer_options(arguments: argparse.Namespace) -> AnswerOptions:
    """Which facts the model is asked about, and who judges.

    Raises:
        SphereError: a judge without facts to judge, or a time that is not positive.
    """
    from sphere.evaluation.answer_metrics import AnswerOptions

    facts = generated_facts(arguments)
    if arguments.judge is not None and not facts:
        raise SphereError(
            "A judge is given, but no answers are generated: give a number of facts.",
            argument=("judge", "generated_facts"),
        )
    if not arguments.judge_seconds > 0:
        raise SphereError(
            f"The judge's time is {arguments.judge_seconds:g} s: give more than 0.", argument="judge_seconds"
        )
    return AnswerOptions(facts, arguments.judge, arguments.judge_seconds)


def generated_facts(arguments: argparse.Namespace) -> int:
    """About how many facts the model is asked; 0: about none."""
    return 0 if arguments.skip_generation_tests else max(arguments.generated_facts, 0)


def exact_match_facts(arguments: argparse.Namespace) -> int:
    """How many facts have greedy text; 0: none."""
    return 0 if arguments.skip_generation_tests else max(arguments.exact_match_facts, 0)


def scored_facts(arguments: argparse.Namespace) -> int:
    """How many facts are scored at most; 0: all.

    Raises:
        SphereError: a negative number, or generated text beside it.
    """
    from sphere.evaluation.scored_facts import check_scored_facts

    asked = (generated_facts(arguments), exact_match_facts(arguments), generation_interval(arguments))
    check_scored_facts(arguments.scored_facts, any(asked))
    return int(arguments.scored_facts)


def generation_interval(arguments: argparse.Namespace) -> int:
    """Text is generated for every so-many-th case; 0: for none."""
    return 0 if arguments.skip_generation_tests else max(arguments.generation_test_interval, 0)


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


def run_cli(main: Callable[[list[str] | None], int | None], spelled: str = "--{}") -> NoReturn:
    """Run a command's `main` and exit: 0 (or what it returns), 2 after an `error: ...` line, 130 on Ctrl-C.

    Other exceptions are bugs and keep their traceback.

    Args:
        spelled: how this command line writes a setting's name, "--{}" or "{}=".
    """
    set_up_logging()
    _end_at_a_second_interrupt()
    try:
        code = main(None)
        sys.stdout.flush()
    except SphereError as error:
        code = _complain(with_flags(error, spelled))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
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


def with_flags(error: SphereError, spelled: str = "--{}") -> str:
    """The sentence of an error, and of which flags it speaks: "... must be at least 1 (--num_edits)."."""
    names: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        names += getattr(cause, "arguments", ())
        cause = cause.__cause__
    flags = ", ".join(spelled.format(name) for name in dict.fromkeys(names))
    return f"{str(error).rstrip('.')} ({flags})." if flags else str(error)


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
