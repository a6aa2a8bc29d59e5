"""Errors that are reported to users in one line: invalid input with its location, and failed runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Self

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


class RunError(RuntimeError):
    """A run failed after its input was accepted. One line says where and why. Exit status 1."""


def dotted_loc(loc: Location) -> str:
    """Return a location as a recipe override writes it: `steps.dpo.train.learning_rate`."""
    return ".".join(map(str, loc))


@contextmanager
def within(*loc: str | int) -> Generator[None]:
    """Prefix the location of every `InputError` raised in this block."""
    try:
        yield
    except InputError as error:
        error.loc = (*loc, *error.loc)
        raise


def one_line(error: BaseException | str) -> str:
    """Return the text of an error folded to one line."""
    return " ".join(str(error).split())
