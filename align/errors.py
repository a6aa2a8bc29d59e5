"""Errors that are reported to users in one line: invalid input with its location, and failed runs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self

CTRL_C, SIGTERM = "Ctrl-C", "SIGTERM"  # what stops a run

Location = tuple[str | int, ...]


class InputError(ValueError):
    """Invalid input. One line says what is wrong, the value, and what would be right. Exit status 2.

    `loc` is the path of keys to the setting, as in `("steps", "dpo", "train", "learning_rate")`; the line of the file
    or the override is added once, where the recipe is read.
    """

    def __init__(self, message: str, loc: Location = ()) -> None:
        super().__init__(message)
        self.message, self.loc = message, loc

    def __str__(self) -> str:
        """Return the dotted location, where there is one, and the message."""
        return f"{dotted_loc(self.loc)}: {self.message}" if self.loc else self.message

    def __reduce__(self) -> tuple[type[Self], tuple[str, Location]]:
        """Keep the location when the error crosses a process boundary."""
        return type(self), (self.message, self.loc)

    @property
    def parts(self) -> tuple[InputError, ...]:
        """The error itself; of several errors, each."""
        return (self,)


class LimitExceeded(InputError):
    """Part of the input takes too much time or memory. Never skipped with its row, since every row may take as much."""


class UnknownKey(InputError):
    """A key that a setting does not have."""


class MissingKey(InputError):
    """A required key that is not given."""


class InputErrors(InputError):
    """Several errors of one input, found together. Each is one line, with its own location."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = tuple(errors)

    def __str__(self) -> str:
        """Return one line for each error."""
        return "\n".join(map(str, self.errors))

    def __reduce__(self) -> tuple[type[Self], Any]:
        """Keep the errors when they cross a process boundary."""
        return type(self), (self.errors,)

    @property
    def parts(self) -> tuple[InputError, ...]:
        """Each of the errors."""
        return self.errors


class ErrorList:
    """Collects the input errors of several checks, to raise them together."""

    def __init__(self) -> None:
        self.found: list[InputError] = []

    @contextmanager
    def collect(self) -> Generator[None]:
        """Add the `InputError` that the block raises to the list."""
        try:
            yield
        except InputError as error:
            self.found += error.parts

    def raise_found(self) -> None:
        """Raise what was found, each error once; do nothing where there is none."""
        if self.found:
            raise joined(self.found)


def joined(errors: Sequence[InputError]) -> InputError:
    """Return the errors as one, each once."""
    distinct = list({str(error): error for error in errors}.values())
    return InputErrors(distinct) if len(distinct) > 1 else distinct[0]


class RunError(RuntimeError):
    """A run failed after its input was accepted. One line says where and why. Exit status 1."""


class Stopped(RunError):
    """A run was stopped by Ctrl-C or SIGTERM, and the same command resumes it. Exit status 130 after Ctrl-C, else 1."""

    def __init__(self, message: str, by: str | None) -> None:
        super().__init__(message)
        self.by = by  # CTRL_C or SIGTERM


def dotted_loc(loc: Location) -> str:
    """Return a location as a recipe override writes it: `steps.dpo.train.learning_rate`."""
    return ".".join(map(str, loc))


@contextmanager
def within(*loc: str | int) -> Generator[None]:
    """Prefix the location of every `InputError` raised in this block."""
    try:
        yield
    except InputError as error:
        for part in error.parts:
            part.loc = (*loc, *part.loc)
        raise


def one_line(error: BaseException | str) -> str:
    """Return the text of an error folded to one line."""
    return " ".join(str(error).split())
