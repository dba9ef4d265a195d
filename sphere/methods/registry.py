"""Which methods there are: those of this package by name, those of other packages through entry points.

A package of its own adds a method by an entry point in the group `sphere.methods`, name = "module:Class":

    [project.entry-points."sphere.methods"]
    MeanShift = "my_package.mean_shift:MeanShift"

Nothing is found by scanning folders, and a module is imported only when its method is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from importlib.metadata import EntryPoint, entry_points

from sphere.errors import SphereError
from sphere.methods.base import Method

log = logging.getLogger(__name__)

GROUP = "sphere.methods"
BUILT_IN = {
    "AlphaEdit": "sphere.methods.alphaedit:AlphaEdit",
    "BetaEdit": "sphere.methods.betaedit:BetaEdit",
    "EMMET": "sphere.methods.emmet:EMMET",
    "ENCORE": "sphere.methods.encore:ENCORE",
    "FT": "sphere.methods.ft:FT",
    "LyapLock": "sphere.methods.lyaplock:LyapLock",
    "MEMIT": "sphere.methods.memit:MEMIT",
    "MEMIT_prune": "sphere.methods.prune:MEMITPrune",
    "MEMIT_rect": "sphere.methods.rect:MEMITRect",
    "MEMIT_seq": "sphere.methods.memit:MEMITSeq",
    "MEND": "sphere.baselines.mend.method:MEND",
    "NAS": "sphere.methods.nas:NAS",
    "ROME": "sphere.methods.rome:ROME",
    "UltraEdit": "sphere.methods.ultraedit:UltraEdit",
}


def available_methods() -> dict[str, type[Method]]:
    """Name -> method, sorted. A method of another package that cannot be used is left out, with a warning."""
    found = {name: _built_in(name) for name in BUILT_IN}
    for entry in _entries():
        try:
            found[entry.name] = _load(entry)
        except SphereError as error:
            log.warning("%s", error)
    return dict(sorted(found.items()))


def get_method(name: str) -> type[Method]:
    """A method by its name; only its own module is imported.

    Raises:
        SphereError: no such method; the message lists those there are. Or it belongs to another package and cannot be
            used; the message says why.
    """
    if name in BUILT_IN:
        return _built_in(name)
    entries = {entry.name: entry for entry in _entries()}
    if name not in entries:
        names = ", ".join(sorted([*BUILT_IN, *entries]))
        raise SphereError(f"Unknown method '{name}': use one of {names}.", argument="alg_name")
    return _load(entries[name])


def _built_in(name: str) -> type[Method]:
    module, _, kind = BUILT_IN[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def _entries() -> list[EntryPoint]:
    """Entry points of other packages; the names of this package's own methods stay theirs."""
    result = []
    for entry in entry_points(group=GROUP):
        if entry.name in BUILT_IN:
            log.warning("The method '%s' of %s is left out: the name is taken.", entry.name, entry.value)
        else:
            result.append(entry)
    return result


def _load(entry: EntryPoint) -> type[Method]:
    about = f"The method '{entry.name}' of another package ({entry.value}) cannot be used"
    try:
        kind = entry.load()
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise SphereError(f"{about}: {type(error).__name__}: {reason}.") from error
    if not (inspect.isclass(kind) and issubclass(kind, Method)) or inspect.isabstract(kind):
        raise SphereError(
            f"{about}: it is no class that derives from sphere.methods.Method and has `updates`."
        )
    if getattr(kind, "name", None) != entry.name:
        raise SphereError(
            f"{about}: its `name` is {getattr(kind, 'name', None)!r}, its entry point '{entry.name}': make them equal."
        )
    return kind
