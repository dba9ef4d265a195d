"""`python -m sphere`: the command `sphere`."""

from sphere.commands.main import run

if __name__ == "__main__":
    run()
