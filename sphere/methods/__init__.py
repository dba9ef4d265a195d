"""Editing methods: what a method is (`base`), what it works with (`edited_model`, `services`), one file per method."""

from __future__ import annotations

from sphere.methods.base import Method
from sphere.methods.edited_model import EditedModel
from sphere.methods.registry import available_methods, get_method
from sphere.methods.services import Services

__all__ = ["EditedModel", "Method", "Services", "available_methods", "get_method"]
