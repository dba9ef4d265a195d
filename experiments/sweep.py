"""`sphere sweep`, in a checkout."""

from sphere.commands.common import run_cli
from sphere.commands.sweep import main

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main, spelled="{}=")
