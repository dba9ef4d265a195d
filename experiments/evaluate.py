"""`sphere edit`, by the name that it is published under."""

from sphere.commands.common import run_cli
from sphere.commands.edit import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    run_cli(main)
