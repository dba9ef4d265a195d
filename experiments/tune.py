"""`sphere tune`, in a checkout."""

from sphere.commands.common import run_cli
from sphere.commands.tune import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    run_cli(main)
