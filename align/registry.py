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

# Importing a user's module runs their code, which may raise any of these
IMPORT_ERRORS = (
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
DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # package.module:name


def suggest(name: str, names: Iterable[str]) -> str:
    """Return the end of an error about a wrong name: the nearest known name, where one is close, and all of them."""
    known = sorted(names)
    close = nearest(name, known)
    return (f"did you mean {close!r}? " if close else "") + f"available: {', '.join(known)}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name that a wrong one may stand for, whatever its case; None where none is close."""
    known = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return known[close[0]] if close else None


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return the entry called `name`; raise `InputError` with the nearest known name where there is none."""
    if name not in table:
        raise InputError(f"no {kind} is called {name!r}; {suggest(name, table)}")
    return table[name]


def import_dotted(path: str, kind: str) -> Any:  # noqa: ANN401 - a user's object has any type
    """Return the object at `package.module:name`, which is how users add their own variants."""
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except IMPORT_ERRORS as error:
        raise InputError(f"{kind} {path!r} cannot be imported as module:name: {_import_failure(error)}") from error


def module_file(path: str) -> Path | None:
    """Return the source file of `package.module:name`, or None where it is not such a path or has no file."""
    if not DOTTED_PATH.fullmatch(path):
        return None
    with suppress(*IMPORT_ERRORS):
        spec = find_spec(path.partition(":")[0])
        return None if spec is None or not spec.has_location else Path(str(spec.origin))
    return None


def _import_failure(error: Exception) -> str:
    """Return what failed in a user's module, with the file and line where its code was running."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without this module's frame
    library = ("<", os.path.dirname(os.__file__))
    of_user = [frame for frame in frames if not frame.filename.startswith(library)]
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {one_line(error.msg)}"
    at = f"{of_user[-1].filename}:{of_user[-1].lineno}: " if of_user else ""
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return f"{at}{kind}{one_line(error)}"
