"""The process that holds the program: it picks the code, runs it, and answers the tests' calls (`crossing`)."""

from __future__ import annotations

import ast
import os
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from align.sandbox.rpc import OPERATIONS, TOGETHER_OPERATIONS, Ended, Line

MOST_CUT = 200  # lines after the code of a response without fences


def main(order: Mapping[str, Any]) -> None:
    """Answer until the tests are through. The order is `Candidates` of `code_tests`; one of them is run."""
    program = sys.modules["program"] = types.ModuleType("program")

    def load(names: Collection[str]) -> None:
        exec(compile(chosen(order, names), "<program>", "exec"), program.__dict__)

    def read(name: str) -> Any:  # noqa: ANN401 - whatever the program has made
        if name not in program.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return program.__dict__[name]

    table: dict[str, Callable[..., Any]] = {**OPERATIONS, **TOGETHER_OPERATIONS, "load": load, "read": read}
    line = Line(table.__getitem__, lends=False)
    try:
        while True:
            line.answer(line.receive())
    except Ended:
        os._exit(0)  # whatever threads and exit handlers the program has left


def chosen(order: Mapping[str, Any], names: Collection[str]) -> str:
    """The last candidate that parses and defines one of the names, else the longest that parses, else the first."""
    candidates: list[tuple[str, str]] = order["codes"]
    fitting = [pair for pair in candidates if parsed("".join(pair))]
    if not fitting and order["cut"]:
        fitting = [shorter for pair in candidates for shorter in cut(*pair)]
    defining = [pair for pair in fitting if defined(pair[1]) & set(names)]
    return "".join(defining[-1] if defining else max(fitting or candidates[:1], key=lambda pair: len(pair[1])))


def cut(before: str, code: str) -> Iterator[tuple[str, str]]:
    """The code without the prose that follows it, if that is all that keeps it from being parsed."""
    lines = code.split("\n")
    for end in range(len(lines) - 1, max(0, len(lines) - MOST_CUT), -1):
        shorter = "\n".join(lines[:end])
        if parsed(before + shorter):
            yield before, shorter
            return


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, None where there is none."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def defined(code: str) -> set[str]:
    """The names that the code defines at its top; of an indented body, which does not parse, none."""
    tree = parsed(code)
    found: set[str] = set()
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found
