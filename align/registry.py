"""Tables of variants: look up a name or a dotted path, and suggest the nearest name; modules imported on first use."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from align.errors import InputError, RunError, one_line

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
IN_NATS = re.compile(r"nll|\bkl(_from_start)?\b", re.IGNORECASE)  # negative log-likelihoods and KL divergences
LOWER = re.compile(
    r"perplexity|bits_per_byte|calibration_error|\b(unparsable|repetition|alignment|uniformity)\b", re.IGNORECASE
)


def suggest(name: str, names: Iterable[str]) -> str:
    """Return the end of an error about a wrong name: the nearest known name, where one is close, and all of them."""
    known = sorted(names)
    close = nearest(name, known)
    return (f"did you mean {close!r}? " if close else "") + f"available: {', '.join(known) or 'none'}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name that a wrong one may stand for, whatever its case; None if none is close."""
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


def pick_class(table: Mapping[str, type[T]], name: str, base: type[T], kind: str) -> type[T]:
    """Return the class called `name`, or a user's own subclass of `base` by its dotted path `module:Class`."""
    if ":" not in name:
        return pick(table, name, kind)
    found = import_dotted(name, kind)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{name} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found


def class_tag(value: object, key: str, table: Mapping[str, type[T]], base: type[T]) -> str:
    """Return the tag of a value in a union over the classes of `table` and `base`: the name of its class.

    A mapping or an object holds its name in the table under `key`; a user's own class has the tag of `base`.
    """
    name: Any = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return table.get(name, base).__name__


def module_file(path: str) -> Path | None:
    """Return the source file of `package.module:name`, or None if it is not such a path or has no file."""
    if not DOTTED_PATH.fullmatch(path):
        return None
    with suppress(*IMPORT_ERRORS):
        spec = find_spec(path.partition(":")[0])
        return None if spec is None or not spec.has_location else Path(str(spec.origin))
    return None


class UserCode(NamedTuple):
    """Runs the code of a user's own judge, loss, reader, ...: its exceptions become a `RunError` with file and line.

    An `InputError` and a `RunError` that it raises are kept.
    """

    kind: str  # "judge"
    path: str  # module:name

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise a `RunError` for the exception of the block."""
        if isinstance(error, Exception) and not isinstance(error, InputError | RunError):
            raise RunError(f"{self.kind} {self.path!r} raised {_raised(error)}") from error

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:  # noqa: ANN401 - any function
        """Return what a function of the user returns."""
        with self:
            return function(*args, **kwargs)

    def wrap(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return a function of the user with this handling of its exceptions."""

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> T:  # noqa: ANN401 - any function
            return self.call(function, *args, **kwargs)

        return wrapped

    def iterate(self, values: Iterable[T]) -> Iterator[T]:
        """Yield what an iterable of the user yields."""
        with self:
            iterator = iter(values)
        while True:
            with self:
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value


def _raised(error: Exception) -> str:
    """Return the class of an exception, the file and line of the user's code that raised it, and its text."""
    at = _frame_of_user(error) or traceback.extract_tb(error.__traceback__)[-1]
    text = one_line(error)
    return f"{type(error).__name__} at {at.filename}:{at.lineno}, in {at.name}" + (f": {text}" if text else "")


def _import_failure(error: Exception) -> str:
    """Return what failed in a user's module, with the file and line where its code was running."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {one_line(error.msg)}"
    frame = _frame_of_user(error)
    at = f"{frame.filename}:{frame.lineno}: " if frame is not None else ""
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return f"{at}{kind}{one_line(error)}"


def _frame_of_user(error: Exception) -> traceback.FrameSummary | None:
    """Return the last frame of an exception outside of Python, this package and installed ones.

    Of an exception in installed packages alone, their last frame; None if there is neither.
    """
    ours = ("<", os.path.dirname(os.__file__), os.path.dirname(__file__))
    frames = traceback.extract_tb(error.__traceback__)
    installed = [frame for frame in frames if "site-packages" in Path(frame.filename).parts]
    own = [frame for frame in frames if frame not in installed and not frame.filename.startswith(ours)]
    return next(reversed(own or installed), None)


class LazyModule:
    """A module that is imported when one of its attributes is first read; settings are validated without it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self._name), name)


def is_in_nats(metric: str) -> bool:
    """Return whether the name of a metric or task says that it is in nats, so that lower is better.

    >>> is_in_nats("chat nll"), is_in_nats("general kl_from_start"), is_in_nats("kl_quiz correct")
    (True, True, False)
    """
    return IN_NATS.search(metric) is not None


def lower_is_better(metric: str) -> bool:
    """Return whether the lower of two values of a metric is the better one, by its name.

    >>> lower_is_better("chat nll"), lower_is_better("word_perplexity,none"), lower_is_better("accuracy")
    (True, True, False)
    """
    return is_in_nats(metric) or LOWER.search(metric) is not None
