"""Values of a published record by their keys, checked; whatever is wrong is said with the key.

Missing, of another type, blank, or a text that cannot be encoded: a `SphereError`, whose sentence a loader puts behind
the file and the record. Knows nothing of records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphere.errors import SphereError
from sphere.requests import check_text


def get_value(entry: Mapping[str, Any], key: str, *kinds: type, name: str | None = None) -> Any:
    """The value of a key; `name` is what an error calls it, where the key alone says too little."""
    name = name or key
    if key not in entry:
        raise SphereError(f"the key '{name}' is missing")
    value = entry[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}
        expected = " or ".join(names[kind] for kind in kinds)
        raise SphereError(f"'{name}' should be {expected}, got {value!r:.60}")
    return value


def get_text(entry: Mapping[str, Any], key: str, name: str | None = None) -> str:
    """The text of a key, not blank."""
    text: str = get_value(entry, key, str, name=name)
    check_text(text, f"'{name or key}'")
    return text


def get_joiner(entry: Mapping[str, Any]) -> str | None:
    """What a record says is to stand between its prompts and targets; it may be empty."""
    return None if entry.get("joiner") is None else str(get_value(entry, "joiner", str))


def optional_text(entry: Mapping[str, Any], key: str, name: str | None = None) -> str | None:
    """The text of a key; None where the record has none."""
    return None if entry.get(key) is None else get_text(entry, key, name)


def get_list(entry: Mapping[str, Any], key: str) -> list[Any]:
    """The list of a key; [] where the record has none."""
    return list(get_value(entry, key, list)) if entry.get(key) else []


def get_objects(entry: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a key that holds a list of them; [] where the record has none."""
    found = get_list(entry, key)
    for one in found:
        if not isinstance(one, dict):
            raise SphereError(f"'{key}' should be a list of objects, got {one!r:.60} in it")
    return found


def get_texts(entry: Mapping[str, Any], key: str, optional: bool = False) -> tuple[str, ...]:
    """The texts of a key that holds a list of them; () where it may be missing and is."""
    if optional and entry.get(key) is None:
        return ()
    texts = get_value(entry, key, list)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise SphereError(f"'{key}' should be a list of non-empty texts")
    for place, text in enumerate(texts):
        check_text(text, f"'{key}'[{place}]")
    return tuple(texts)
