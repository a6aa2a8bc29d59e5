"""The process that holds the tests: it asks the program for values (`crossing`) and says of each test how it went."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import symtable
import sys
from collections.abc import Callable, Mapping
from typing import Any

from align.sandbox.rpc import OPERATIONS, TOGETHER_OPERATIONS, Ended, Line, RemoteObject, shown

OWN = "tests"  # the module of what the tests define


def main(order: Mapping[str, Any]) -> None:
    """Run the tests one after the other in one namespace; a line of JSON each, as soon as it is known."""
    run = Tests(order["entry_point"])
    sources = [order["setup"], *order["tests"]]
    with os.fdopen(5, "w", buffering=1) as results:
        if why := broken(sources):
            print(json.dumps([-1, why]), file=results)
            return
        wrong = run.start(sources)
        for index, test in enumerate(order["tests"]):
            print(json.dumps([index, wrong or run.outcome(test)]), file=results)


def broken(sources: list[str]) -> str:
    """Which of the setup and the tests is not Python, and why; "" where all are."""
    for index, source in enumerate(sources):
        try:
            compile(source, "<test>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"{f'test {index}' if index else 'the setup'} is not Python: {reason(error)}, in {shown(source)}"
    return ""


class Tests:
    """The tests' namespace and their line to the program."""

    def __init__(self, entry_point: str | None) -> None:
        self.entry_point = entry_point
        self.line = Line(served, lends=True)
        self.namespace: dict[str, Any] = {"__name__": OWN}
        self.lent = {entry_point}  # names that are the program's

    def start(self, sources: list[str]) -> str:
        """Why no test can be run, "" if they can: the program is loaded and the first source, the setup, is run."""
        names = sorted({name for source in sources for name in self.wanted(source)})
        try:
            self.line.ask("load", names)
        except Exception as error:  # whatever the program raises
            return f"the program does not load: {reason(error)}"
        except Ended:
            return f"{self.ended()} while it was loaded"
        why = self.outcome(sources[0])
        return f"the setup of the tests fails: {why}" if why else ""

    def outcome(self, source: str) -> str:
        """Why a test fails, "" if it holds."""
        try:
            self.lend(source)
            exec(compile(source, "<test>", "exec"), self.namespace)
        except Ended:
            pass
        except BaseException as error:  # SystemExit too is an outcome
            return self.failed(source, error)
        return self.ended() if self.line.over else ""

    def ended(self) -> str:
        """The end of the program as this side sees it."""
        return f"the program {self.line.over}"

    def failed(self, source: str, error: BaseException) -> str:
        """The reason that an error gives."""
        if self.line.over:
            return self.ended()
        if not isinstance(error, AssertionError):
            return f"{reason(error)}, in {shown(source)}"
        return f"does not hold: {shown(source)}; the last answer was {self.last()}"

    def last(self) -> str:
        """The program's last answer as part of a reason."""
        if type(self.line.last) is RemoteObject:
            return "an object of a class of its own"
        try:
            return shown(repr(self.line.last))
        except (ValueError, RecursionError):  # a number of more digits than Python writes
            return "too long or too deep to be shown"

    def lend(self, source: str) -> None:
        """Give the namespace what the source uses and the tests do not define: the program's names, modules."""
        for name in self.wanted(source):
            if name in self.namespace and name not in self.lent:
                continue
            try:
                self.namespace[name] = self.line.ask("read", name)
            except NameError:
                continue  # the test says so itself
            self.lent.add(name)
        for name in modules(source):
            if name not in self.namespace:
                self.namespace[name] = importlib.import_module(name)
        self.line.last = None

    def wanted(self, source: str) -> set[str]:
        """The program's names that a source uses: those of Python's only if there is no other, or by `entry_point`."""
        free = free_names(source) - modules(source)
        other = {name for name in free if not hasattr(builtins, name)}
        if self.entry_point is not None:
            return other | (free & {self.entry_point})
        return other or free


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {shown(str(error))}".removeprefix("ProgramError: ")


def free_names(source: str) -> set[str]:
    """Global names that a source uses and does not define."""
    top = symtable.symtable(source, "<test>", "exec")
    defined = {name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {
            name.get_name()
            for name in table.get_symbols()
            if name.is_referenced() and (table is top or name.is_global())
        }
    return used - defined


def modules(source: str) -> set[str]:
    """Names of standard modules that a source uses as such: `math.isclose`, but not `bisect(...)`, a program's own."""
    tree = ast.parse(source)
    owners = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.id for node in owners if isinstance(node, ast.Name)}
    plain = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in owners}
    return (read - plain) & sys.stdlib_module_names & free_names(source)


def served(operation: str) -> Callable[..., Any]:
    """What the program may do to the objects that the tests hand over: read public attributes of the tests' classes."""
    return GUARDED.get(operation) or {**OPERATIONS, **TOGETHER_OPERATIONS}[operation]


def _public(target: object, name: str) -> None:
    if type(target).__module__ != OWN or name.startswith("_"):
        raise AttributeError(f"{name!r} of {type(target).__name__!r} object stays with the tests")


def _read(target: object, name: str) -> Any:  # noqa: ANN401 - whatever the tests put there
    _public(target, name)
    return getattr(target, name)


def _write(target: object, name: str, value: object) -> None:
    _public(target, name)
    setattr(target, name, value)


GUARDED: dict[str, Callable[..., Any]] = {"__getattr__": _read, "__setattr__": _write}
