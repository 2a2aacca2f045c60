"""Modules that are imported when they are first used.

The workflow reads an experiment's settings in every one of its processes, and a method's settings stand in the file of
its losses. Torch and the networks take seconds to import; a method's file names them here instead of importing them.
"""

import importlib
from typing import Any


class _Lazy:
    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


def lazy(name: str) -> Any:
    """The module `name`, imported when an attribute of it is first asked for."""
    return _Lazy(name)
