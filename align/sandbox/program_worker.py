"""The worker that holds the program: it selects the code in a response, runs it and serves the tests' calls."""

from __future__ import annotations

import ast
import os
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from align.sandbox.rpc.awaitables import Tasks
from align.sandbox.rpc.connection import Connection, Disconnected
from align.sandbox.rpc.operations import OPERATIONS

MAX_CUT_LINES = 200  # that may follow the code in a response without fences


def main(request: Mapping[str, Any]) -> None:
    """Serve calls until the tests end. The request is `Candidates` of `code_extraction`, one of which is run."""
    program = sys.modules["program"] = types.ModuleType("program")

    def load(names: Collection[str]) -> None:
        exec(compile(select_program(request, names), "<program>", "exec"), program.__dict__)

    def read(name: str) -> Any:  # noqa: ANN401 - any object of the program
        if name not in program.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return program.__dict__[name]

    def derive(name: str, bases: list[type], namespace: dict[str, Any], /, **named: Any) -> int:  # noqa: ANN401
        kind = types.new_class(name, tuple(bases), named, lambda body: body.update(namespace))
        return connection.number_of(kind)

    tasks = Tasks()
    operations: dict[str, Callable[..., Any]] = {
        **OPERATIONS,
        **{"load": load, "read": read, "derive": derive, "super": super_attribute, "names": attribute_names},
        "method attribute": method_attribute,
        **{"start": tasks.start, "advance": tasks.advance, "result": tasks.result, "cancel": tasks.cancel},
    }
    connection = Connection(operations.__getitem__, trusted=False)
    try:
        while True:
            connection.serve(connection.receive())
    except Disconnected:
        os._exit(0)  # regardless of threads and exit handlers of the program


def super_attribute(kind: type, instance: Any, name: str) -> Any:  # noqa: ANN401 - any object
    """Return the attribute of an object that a class or its base classes define."""
    for base in kind.__mro__:
        if name in vars(base):
            attribute = vars(base)[name]
            bind = getattr(type(attribute), "__get__", None)
            return bind(attribute, instance, type(instance)) if bind else attribute
    raise AttributeError(f"'super' object has no attribute {name!r}")


def method_attribute(owner: object, method: str, name: str) -> Any:  # noqa: ANN401 - any value
    """Return an attribute of a bound method."""
    return getattr(getattr(owner, method), name)


def attribute_names(kind: type) -> list[str]:
    """Return the names of the attributes that a class and its base classes define."""
    names = {name for base in kind.__mro__ for name in vars(base)}
    return sorted({"__init__", *(name for name in names if not name.startswith("__"))})


def select_program(request: Mapping[str, Any], names: Collection[str]) -> str:
    """Return the last candidate that parses and defines one of `names`, or the longest that parses, or the first."""
    candidates: list[tuple[str, str]] = request["codes"]
    parsing = [pair for pair in candidates if parse("".join(pair))]
    if not parsing and request["cut"]:
        parsing = [shorter for pair in candidates for shorter in without_prose(*pair)]
    defining = [pair for pair in parsing if defined_names(pair[1]) & set(names)]
    return "".join(defining[-1] if defining else max(parsing or candidates[:1], key=lambda pair: len(pair[1])))


def without_prose(before: str, code: str) -> Iterator[tuple[str, str]]:
    """Yield the longest beginning of the code that parses as Python, if cutting lines off its end helps."""
    lines = code.split("\n")
    for end in range(len(lines) - 1, max(0, len(lines) - MAX_CUT_LINES), -1):
        shorter = "\n".join(lines[:end])
        if parse(before + shorter):
            yield before, shorter
            return


def parse(code: str) -> ast.Module | None:
    """Return the syntax tree, None for code that does not parse."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def defined_names(code: str) -> set[str]:
    """Return the names that the code defines at its top level; none for code that does not parse."""
    tree = parse(code)
    found: set[str] = set()
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found
