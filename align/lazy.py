"""Modules that are imported on first use, for code whose settings are validated without them."""

from __future__ import annotations

from importlib import import_module


class LazyModule:
    """A module that is imported when one of its attributes is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        return getattr(import_module(self._name), name)
