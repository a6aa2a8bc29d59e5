"""Which names of the program the tests use as those of classes: only the tests' text decides, not the program.

Where a test compares `total(2)` with a plain value, it expects a plain value, even if the program makes `total` a
class. Where it reads `Vector(1, 2).x`, it expects an object, and tests the operators of its class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

from align.sandbox.rpc.proxies import MADE_BY_TEST, OPERAND
from align.sandbox.rpc.values import PLAIN, SHARED

CAPITALIZED = re.compile("_*[A-Z][A-Za-z0-9]*")
PLAIN_ATTRIBUTES = {name for kind in (*PLAIN, *SHARED, BaseException) for name in dir(kind)}


def class_levels(sources: Sequence[str]) -> dict[str, int]:
    """Return how far the operators of the objects that are made by a name are trusted, for names of classes.

    A name that is a base class, caught or in `isinstance`, or whose objects have attributes that no plain value has
    or are combined with each other, is a class: all operators are trusted. One that is just capitalized may be a
    function: its objects' comparisons with plain values are not trusted.
    """
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    made = _variables(nodes)
    certain = {name for node in nodes for name in _shown_to_be_classes(node, made)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    levels = {name: OPERAND for name in called if CAPITALIZED.fullmatch(name)}
    return levels | dict.fromkeys(certain, MADE_BY_TEST)


def _variables(nodes: Sequence[ast.AST]) -> dict[str, set[str]]:
    """Return the names called in the values of each variable."""
    made: dict[str, set[str]] = {}
    for _ in range(2):  # a variable may be made of others
        for node in nodes:
            for target, value in _assignments(node):
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        made.setdefault(part.id, set()).update(_origins(value, made))
    return made


def _assignments(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, ast.AugAssign | ast.NamedExpr):
        yield node.target, node.value
    elif isinstance(node, ast.For | ast.comprehension):
        yield node.target, node.iter
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars, node.context_expr


def _origins(expression: ast.AST, made: dict[str, set[str]]) -> set[str]:
    """Return the names that are called for the value of an expression."""
    found: set[str] = set()
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.Name):
            found |= made.get(node.id, set())
    return found


def _shown_to_be_classes(node: ast.AST, made: dict[str, set[str]]) -> set[str]:
    match node:
        case ast.Attribute(value=value, attr=attribute) if attribute not in PLAIN_ATTRIBUTES:
            return _origins(value, made) | ({value.id} if isinstance(value, ast.Name) else set())
        case ast.BinOp(left=left, right=right):
            return _origins(left, made) & _origins(right, made)
        case ast.Compare(left=left, comparators=others):
            return {name for other in others for name in _origins(left, made) & _origins(other, made)}
        case ast.withitem(context_expr=context):
            return _origins(context, made)
        case ast.ClassDef(bases=bases):
            return _names(bases)
        case ast.ExceptHandler(type=kind) if kind is not None:
            return _names([kind])
        case ast.MatchClass(cls=kind):
            return _names([kind])
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]):
            return _names([kind])
        case _:
            return set()


def _names(expressions: Sequence[Any]) -> set[str]:
    return {node.id for each in expressions for node in ast.walk(each) if isinstance(node, ast.Name)}
