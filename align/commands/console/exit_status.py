"""How the command line ends: errors as one line on stderr, and the exit status."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from align.commands.console.quiet import quiet_libraries
from align.distributed.signals import Terminated, ignore_sigterm, raise_on_sigterm
from align.errors import CTRL_C, SIGTERM, InputError, RunError, Stopped
from align.redaction import printable, redact
from align.storage.disk_errors import FULL

INTERRUPTED = 130  # exit status of a command interrupted from the keyboard
RERUN = "rerun the same command to resume from the last checkpoint"
USAGE_ERROR: Any = typer.BadParameter.__bases__  # click's UsageError; newer typers contain their own


class Commands(TyperGroup):
    """The commands, of which an interrupt is an error in one line that says how to resume."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer contains its own click
        """Run a command. What was interrupted is in the notes of the exception, the innermost first.

        When a process of a launch dies, its launcher sends SIGTERM to the others. One that is already ending with an
        error shows the error, at whatever moment the signal arrives.
        """
        try:
            try:
                return super().invoke(ctx)
            except (InputError, RunError):
                ignore_sigterm()
                raise
        except KeyboardInterrupt as error:
            if isinstance(error, Terminated) and (ending := _failure_in(error)):
                raise ending from None
            by = SIGTERM if isinstance(error, Terminated) else CTRL_C
            notes = ", ".join(reversed(getattr(error, "__notes__", [])))
            what = "interrupted" if by == CTRL_C else f"stopped by {by}"
            raise Stopped(f"{what}; {notes or RERUN}", by) from error


def exit_with(app: typer.Typer) -> None:
    """Run the command line. Errors are one line on stderr.

    The exit status is 2 for bad input, 130 after Ctrl-C, 3 for a spent budget, and 1 for a failed run.
    """
    sys.excepthook = _unexpected
    sys.path.append(os.getcwd())  # where a recipe's `module:name` is looked up last
    with raise_on_sigterm():
        _run(app)


def _run(app: typer.Typer) -> None:
    status = 0
    try:
        with quiet_libraries():
            status = app(standalone_mode=not sys.argv[1:]) or 0  # standalone mode shows the help without arguments
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered cannot be written at the exit, either
        _fail(f"the output cannot be written: {error.strerror}", status=1)
    except USAGE_ERROR as error:
        _fail(_usage_message(error), status=2)
    except (ValueError, RuntimeError) as error:
        if not isinstance(error, InputError | RunError):
            raise
        lines = map(str, error.parts) if isinstance(error, InputError) else [str(error)]
        stopped = error.exit_status if isinstance(error, Stopped) else 1
        _fail(*lines, status=2 if isinstance(error, InputError) else stopped)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # typer's own status, too
        _fail(f"interrupted; {RERUN}", status=status)
    if status:
        end(status)


def _failure_in(error: BaseException) -> InputError | RunError | None:
    """Return the failure that was ending the process when an exception came in between."""
    before = error.__context__
    return before if before is None or isinstance(before, InputError | RunError) else _failure_in(before)


def _usage_message(error: BaseException) -> str:
    """Return what is wrong with a call, and which help to read."""
    usage: Any = error
    message = str(usage.format_message()).rstrip(".")
    return message if usage.ctx is None else f"{message}; see {usage.ctx.command_path} --help"


def _fail(*errors: str, status: int) -> None:
    """Write each error as one line, and exit."""
    lines = [f"align: {' '.join(printable(error).split())}\n" for error in errors]
    sys.stderr.write("".join(lines))  # one write: two processes may fail at once
    end(status)


def end(status: int) -> NoReturn:
    """Exit. One of several processes exits at once: torch's teardown may wait for the others, or abort."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show the traceback of an unexpected error without secrets; exit at once if others wait for this process."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
    if "RANK" in os.environ:
        end(1)
