"""Tables of variants: look up a name or a dotted path, and suggest the nearest name."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from align.errors import InputError, one_line

T = TypeVar("T")

# What importing a user's module may raise: it runs their program.
OF_A_PROGRAM = (
    ImportError,
    AttributeError,
    ValueError,
    TypeError,
    SyntaxError,
    NameError,
    LookupError,
    ArithmeticError,
    AssertionError,
    OSError,
    RuntimeError,
)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # module:name


def suggest(name: str, names: Iterable[str]) -> str:
    """The hint that ends an error about a wrong name: the nearest right one, and all there are."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(known)}"


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry called `name`, or an error that offers the nearest right one."""
    if name not in table:
        raise InputError(f"no {kind} is called {name!r}; {suggest(name, table)}")
    return table[name]


def import_dotted(path: str, kind: str) -> Any:  # noqa: ANN401 - a user's own object has whatever type it has
    """The object that `package.module:name` names: how a user's own piece comes in."""
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except OF_A_PROGRAM as error:
        raise InputError(f"{kind} {path!r} cannot be imported as module:name: {_told(error)}") from error


def module_file(path: str) -> Path | None:
    """The file with the code that `package.module:name` names; None where the text names none that is found."""
    if not DOTTED.fullmatch(path):
        return None
    with suppress(*OF_A_PROGRAM):
        found = find_spec(path.partition(":")[0])
        return None if found is None or not found.has_location else Path(str(found.origin))
    return None


def _told(error: Exception) -> str:
    """What went wrong in a user's module, with the file and line unless it was not even found."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # behind our own
    there = [frame for frame in frames if not frame.filename.startswith(("<", os.path.dirname(os.__file__)))]
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {one_line(error.msg)}"
    where = f"{there[-1].filename}:{there[-1].lineno}: " if there else ""
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return f"{where}{kind}{one_line(error)}"
