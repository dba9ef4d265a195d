"""Editing methods, one module each; whatever module lies here (or in `baselines`) and declares a method is found."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from sphere.errors import SphereError
from sphere.methods.base import Method
from sphere.methods.edited_model import EditedModel
from sphere.methods.services import Services

PACKAGES = ("sphere.methods", "baselines")


def available_methods() -> dict[str, type[Method]]:
    """Name -> method, of every module in the packages that hold methods."""
    found: dict[str, type[Method]] = {}
    for package_name in PACKAGES:
        try:
            package = importlib.import_module(package_name)
        except ModuleNotFoundError:  # sphere used as a library, without the checkout's baselines
            continue
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package_name}.{info.name}")
            for _, member in inspect.getmembers(module, inspect.isclass):
                if issubclass(member, Method) and not inspect.isabstract(member):
                    found[member.name] = member
    return dict(sorted(found.items()))


def get_method(name: str) -> type[Method]:
    """A method by its name.

    Raises:
        SphereError: no such method; the message lists those there are.
    """
    methods = available_methods()
    if name not in methods:
        raise SphereError(f"Unknown method '{name}': give --alg_name one of {', '.join(methods)}.")
    return methods[name]


__all__ = ["EditedModel", "Method", "Services", "available_methods", "get_method"]
