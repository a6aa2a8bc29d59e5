"""The worker that holds the tests: it asks the program for values (`rpc`) and reports the outcome of each test."""

from __future__ import annotations

import ast
import builtins
import importlib
import symtable
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from align.sandbox import framing
from align.sandbox.class_names import class_levels
from align.sandbox.rpc.access import TESTS_MODULE, allowed_operation
from align.sandbox.rpc.connection import Connection, Disconnected, safe_text, shorten
from align.sandbox.rpc.proxies import RemoteType, handle_of

RESULTS_DESCRIPTOR = 5


class Failure(NamedTuple):
    """Why a test failed; all defaults where it passed."""

    why: str = ""
    program_ended: bool = False  # the host completes `why` by the way in which the program ended


PASSED = Failure()


def main(request: Mapping[str, Any]) -> None:
    """Run the tests one after the other in one namespace; send (index, why, program_ended) of each as it ends.

    Index -1 is for tests that are not valid Python.
    """

    def send(index: int, outcome: Failure) -> None:
        framing.write(RESULTS_DESCRIPTOR, framing.pack_json([index, *outcome]))

    run = TestRun(request["entry_point"])
    sources = [request["setup"], *request["tests"]]
    if why := invalid_source(sources):
        send(-1, Failure(why))
        return
    not_started = run.start(sources)
    for index, test in enumerate(request["tests"]):
        send(index, run.run(test) if not_started == PASSED else not_started)


def invalid_source(sources: list[str]) -> str:
    """Return which of the setup and the tests is not valid Python, and why; "" where all are valid."""
    for index, source in enumerate(sources):
        try:
            compile(source, "<test>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"{f'test {index}' if index else 'the setup'} is not Python: {describe(error)}, in {shorten(source)}"
    return ""


class TestRun:
    """The tests' namespace and their connection to the program."""

    def __init__(self, entry_point: str | None) -> None:
        self.entry_point = entry_point
        self.connection = Connection(allowed_operation, trusted=True)
        self.namespace: dict[str, Any] = {"__name__": TESTS_MODULE}
        self.class_levels: dict[str, int] = {}  # of the names that the tests use as those of classes
        self.program_names = {entry_point}  # names in the namespace that are the program's

    def start(self, sources: list[str]) -> Failure:
        """Load the program and run the first source, the setup; return why no test can run."""
        self.class_levels = class_levels(sources)
        names = sorted({name for source in sources for name in self.names_of_program(source)})
        try:
            self.connection.call("load", names)
        except Disconnected:
            return self.disconnected(" while loading")
        except BaseException as error:  # any error of the program, SystemExit too
            return Failure(f"the program fails to load: {describe(error)}")
        setup = self.run(sources[0])
        if setup.program_ended:
            return self.disconnected(" in the setup of the tests")
        return PASSED if setup == PASSED else Failure(f"the setup of the tests fails: {setup.why}")

    def run(self, source: str) -> Failure:
        """Run one test."""
        try:
            self.bind(source)
            exec(compile(source, "<test>", "exec"), self.namespace)
        except Disconnected:
            pass
        except BaseException as error:  # SystemExit is an outcome, too
            return self.failure(source, error)
        return self.disconnected() if self.connection.closed else PASSED

    def disconnected(self, when: str = "") -> Failure:
        """Return the failure of a test during which the program ended."""
        ended = self.connection.closed == "ended"
        return Failure(when if ended else f"the program {self.connection.closed}{when}", program_ended=ended)

    def failure(self, source: str, error: BaseException) -> Failure:
        """Return the failure of a test that raised an error."""
        if self.connection.closed:
            return self.disconnected()
        if not isinstance(error, AssertionError):
            return Failure(f"{describe(error)}, in {shorten(source)}")
        return Failure(f"assertion failed: {shorten(source)}; the program's last value was {self.last_value()}")

    def last_value(self) -> str:
        """Return the program's last value as part of a message."""
        value = self.connection.last_value
        if isinstance(type(value), RemoteType):
            return "an object of one of its classes"
        try:
            return shorten(repr(value))
        except (ValueError, RecursionError):  # an integer with more digits than Python prints
            return "too long or too deep to print"
        except (Exception, Disconnected) as error:  # of one of its objects in a list
            return f"not printable: {type(error).__name__}"

    def bind(self, source: str) -> None:
        """Add to the namespace what the source uses and the tests do not define: the program's names, and modules."""
        for name in self.names_of_program(source):
            if name in self.namespace and name not in self.program_names:
                continue
            try:
                value = self.connection.call("read", name)
            except NameError:
                continue  # the test raises it itself
            if type(value) is RemoteType and (handle := handle_of(value)):
                handle.made_level = self.class_levels.get(name, handle.made_level)
            self.namespace[name] = value
            self.program_names.add(name)
        for name in module_names(source):
            if name not in self.namespace:
                self.namespace[name] = importlib.import_module(name)
        self.connection.last_value = None

    def names_of_program(self, source: str) -> set[str]:
        """Return the names in a source that mean the program's objects.

        A built-in name does so only as the entry point, or where the source uses no other undefined name.
        """
        free = free_names(source) - module_names(source)
        other = {name for name in free if not hasattr(builtins, name)}
        if self.entry_point is not None:
            return other | (free & {self.entry_point})
        return other or free


def describe(error: BaseException) -> str:
    """Return an error on one line."""
    return f"{type(error).__name__}: {shorten(safe_text(error))}".removeprefix("ProgramError: ")


def free_names(source: str) -> set[str]:
    """Return the global names that a source uses and does not define."""
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


def module_names(source: str) -> set[str]:
    """Return the standard modules that a source uses as such: `math.isclose`, but not `bisect(...)`, a function."""
    tree = ast.parse(source)
    owners = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.id for node in owners if isinstance(node, ast.Name)}
    plain = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in owners}
    return (read - plain) & sys.stdlib_module_names & free_names(source)
