"""What pyproject.toml cannot say: of `hparams/` and `data/` only what git tracks goes into a package."""

import subprocess

from setuptools import setup

SHIPPED = ("hparams", "data")


def untracked(folder: str) -> list[str]:
    """Files that a user has put there, by their names in `folder`; none are known outside a git checkout."""
    command = ["git", "ls-files", "--others", "-z", "--", "."]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [name for name in run.stdout.split("\0") if name]


setup(exclude_package_data={f"sphere.shipped.{folder}": untracked(folder) for folder in SHIPPED})
