"""What the program may do to the tests' objects: operate on them, and read attributes of the tests' own classes."""

from __future__ import annotations

import io
import random
import types
from collections.abc import Callable
from typing import Any

from align.sandbox.rpc.operations import OPERATIONS

TESTS_MODULE = "tests"  # the module of the tests' own definitions
OPEN_CLASSES = (io.StringIO, io.BytesIO, random.Random)  # whose public attributes are accessible, too
OF_FUNCTIONS = {"__name__", "__qualname__", "__module__", "__doc__", "__annotations__"}
OF_OBJECTS = {"__dict__", "__class__"}


def _module(kind: type) -> Any:  # noqa: ANN401 - a string, as a rule
    return type.__getattribute__(kind, "__dict__").get("__module__")


def _check_accessible(target: object, name: str, *, writing: bool = False) -> None:
    kind = target if isinstance(target, type) else type(target)
    if isinstance(target, types.FunctionType) or target is kind:
        accessible = name in OF_FUNCTIONS and not writing
    else:
        accessible = name in OF_OBJECTS and _module(kind) == TESTS_MODULE and not writing
    if not name.startswith("_"):
        accessible |= kind in OPEN_CLASSES or _module(kind) == TESTS_MODULE
    elif not name.startswith("__"):
        modules = {_module(base) for base in kind.__mro__}
        accessible |= _module(kind) == TESTS_MODULE and modules <= {TESTS_MODULE, None}
    if not accessible:
        raise AttributeError(f"{name!r} of {kind.__name__!r} object is not accessible to the program")


def _read_attribute(target: object, name: str, /) -> Any:  # noqa: ANN401 - any object of the tests
    _check_accessible(target, name)
    return getattr(target, name)


def _write_attribute(target: object, name: str, value: object, /) -> None:
    _check_accessible(target, name, writing=True)
    setattr(target, name, value)


def _delete_attribute(target: object, name: str, /) -> None:
    _check_accessible(target, name, writing=True)
    delattr(target, name)


def _call_method(target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object
    return _read_attribute(target, name)(*args, **kwargs)


def _list_attributes(target: object, /) -> list[str]:
    return dir(target) if _module(type(target)) == TESTS_MODULE else []


GUARDED: dict[str, Callable[..., Any]] = {
    **{"__getattr__": _read_attribute, "__setattr__": _write_attribute, "__delattr__": _delete_attribute},
    **{"method": _call_method, "__dir__": _list_attributes},
}


def allowed_operation(operation: str) -> Callable[..., Any]:
    """Return what the program may run on the tests' objects."""
    if operation in GUARDED:
        return GUARDED[operation]
    if operation in OPERATIONS:
        return OPERATIONS[operation]
    raise TypeError(f"{operation!r} of the tests' objects is not accessible to the program")
