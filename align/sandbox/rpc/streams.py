"""Standard streams, `input` and `print` that the tests have replaced, in the program: it writes to theirs."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

REPLACEABLE = {
    "stdin": sys,
    "stdout": sys,
    "stderr": sys,
    "input": builtins,
    "print": builtins,
}


class Streams:
    """What a process had when it started, to find what has been replaced since."""

    def __init__(self) -> None:
        self._original = {name: getattr(owner, name) for name, owner in REPLACEABLE.items()}

    def replaced(self) -> list[str]:
        """Return the names of what has been replaced."""
        return [name for name, owner in REPLACEABLE.items() if getattr(owner, name) is not self._original[name]]

    def call(self, name: str, method: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any value
        """Call what has been put in place of a stream or function: the operation that the program may call."""
        if name not in self.replaced() or method not in METHODS:
            raise AttributeError(f"{name}.{method} is not accessible to the program")
        return getattr(getattr(REPLACEABLE[name], name), method)(*args, **kwargs)


METHODS = ("write", "readline", "__call__")


class RemoteStream(io.TextIOBase):
    """A standard stream of the tests."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def write(self, text: str, /) -> int:
        """Write a text."""
        self._call("write", str(text))
        return len(text)

    def readline(self, size: int = -1, /) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - text only
        """Read a line."""
        return self._call("readline", size)

    def read(self, size: int | None = -1, /) -> str:
        """Read everything."""
        return "".join(iter(self.readline, ""))


@contextmanager
def replaced(names: Sequence[str], call: Callable[..., Any]) -> Generator[None]:
    """Use the tests' streams and functions in place of this process's own."""
    before = {name: getattr(REPLACEABLE[name], name) for name in names}

    for name in names:
        is_function = REPLACEABLE[name] is builtins
        new = partial(call, "stream", name, "__call__") if is_function else RemoteStream(partial(call, "stream", name))
        setattr(REPLACEABLE[name], name, new)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(REPLACEABLE[name], name, value)
