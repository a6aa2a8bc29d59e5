"""Errors that are reported to users in one line: invalid input with its location, and failed runs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

CTRL_C, SIGTERM = "Ctrl-C", "SIGTERM"  # what stops a run
BUDGET = "budget."  # the start of what else does: a cap of the recipe's budget
EXIT_STATUS = {CTRL_C: 130, SIGTERM: 1}  # of a run that was stopped
EXIT_BUDGET = 3

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


class RowOrigin(NamedTuple):
    """Where a row was read, and whether it is skipped, and not an error, if a model refuses it."""

    place: str = ""  # as in "prompts.jsonl: row 12"
    skips: bool = False

    def refuse(self, reason: str) -> None:
        """Raise `InputError` for a reason why a model refuses the row, unless it is skipped."""
        if not self.skips:
            raise InputError(f"{self.place}: {reason}" if self.place else reason)


class RunError(RuntimeError):
    """A run failed after its input was accepted. One line says where and why. Exit status 1."""


class Stopped(RunError):
    """A run was stopped by Ctrl-C, SIGTERM or a cap of its budget, and can be resumed.

    Exit status 130 after Ctrl-C, 1 after SIGTERM, and 3 where the budget is spent.
    """

    def __init__(self, message: str, by: str) -> None:
        super().__init__(message)
        self.by = by  # CTRL_C, SIGTERM, or the cap with what was spent of it

    @property
    def exit_status(self) -> int:
        """Exit status of the command."""
        return EXIT_BUDGET if self.by.startswith(BUDGET) else EXIT_STATUS[self.by]


def how_to_resume(by: str) -> str:
    """Return what to do to resume a run that was stopped.

    >>> how_to_resume("budget.hours (2.1 of 2 hours spent)")
    'raise budget.hours and rerun the same command'
    """
    return f"raise {by.split()[0]} and rerun the same command" if by.startswith(BUDGET) else "rerun the same command"


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


@contextmanager
def noting_interrupts(text: str) -> Generator[None]:
    """Add a note to an interrupt of this block: what a rerun of the command resumes."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(text)
        raise


def one_line(error: BaseException | str) -> str:
    """Return the text of an error folded to one line."""
    return " ".join(str(error).split())
