"""What one process may do to an object of the other: Python's data model as a table of operations."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any


def _call(target: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any function
    return target(*args, **kwargs)


def _call_method(target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object
    return getattr(target, name)(*args, **kwargs)


def _special(name: str) -> Callable[..., Any]:
    """Return what calls a special method, which is looked up on the class."""

    def operation(target: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object
        return getattr(type(target), name)(target, *args, **kwargs)

    return operation


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    def operation(target: Any, other: Any, /, *more: Any) -> Any:  # noqa: ANN401 - any object
        return function(other, target, *more)

    return operation


def _is_instance(kind: type, value: object, /) -> bool:
    return isinstance(value, kind)


def _step(name: str) -> Callable[..., Any]:
    """Return what calls a method of a generator."""

    def operation(target: Any, /, *args: Any) -> Any:  # noqa: ANN401 - any generator
        return getattr(target, name)(*args)

    return operation


def _deep_copy(target: Any, _memo: object = None, /) -> Any:  # noqa: ANN401 - any object
    return copy.deepcopy(target)


ARITHMETIC = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("lshift", "rshift", "and", "xor", "or"),
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, f"__{name}__") for name in ARITHMETIC},
    "divmod": divmod,
    "pow": pow,
}
SPECIAL = (
    *("enter", "exit", "aenter", "aexit", "aiter", "anext"),
    *("get", "set", "delete", "set_name", "missing", "fspath", "length_hint"),
)
COMPARISONS = {f"__{name}__": getattr(operator, f"__{name}__") for name in ("eq", "ne", "lt", "le", "gt", "ge")}
BINARY: dict[str, Callable[..., Any]] = {
    **{f"__{name}__": function for name, function in FUNCTIONS.items()},
    **{f"__r{name}__": _reflected(function) for name, function in FUNCTIONS.items()},
    **{f"__i{name}__": getattr(operator, f"__i{name}__") for name in ARITHMETIC},
}
CLOSED = {*BINARY, "__neg__", "__pos__", "__invert__"} - {"__divmod__", "__rdivmod__"}  # make one of the same kind
OPERATIONS: dict[str, Callable[..., Any]] = {
    **COMPARISONS,
    **BINARY,
    "__call__": _call,
    **{f"__{call.__name__}__": call for call in (len, iter, next, bool, str, repr, hash, abs, int, float, complex)},
    **{f"__{call.__name__}__": call for call in (round, reversed, bytes, format, dir)},
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in ("neg", "pos", "invert", "index")},
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in ("getitem", "setitem", "delitem", "contains")},
    **{f"__{name}__": getattr(math, name) for name in ("trunc", "floor", "ceil")},
    **{f"__{name}__": _special(f"__{name}__") for name in SPECIAL},
    **{"__getattr__": getattr, "__setattr__": setattr, "__delattr__": delattr},
    **{"__copy__": copy.copy, "__deepcopy__": _deep_copy, "__instancecheck__": _is_instance},
    "method": _call_method,
    **{name: _step(name) for name in ("send", "throw", "close")},
}
ITERATION = ("__next__", "send", "throw")  # whose StopIteration ends the iteration of the caller
