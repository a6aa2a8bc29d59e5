"""The command of a managed server: whether it exists, and the version of its program. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from align.distributed.launch import environment_without_launch
from align.errors import InputError, one_line
from align.inference.managed.kinds import KINDS
from align.inference.managed.settings import ManagedSettings
from align.redaction import printable

VERSION = re.compile(r"(?:^|\s)v?(\d+\.\d+[\w.+-]*)\s*$", re.MULTILINE)  # at the end of a line
MAX_SHOWN = 200  # characters of a program's output in an error


def server_environment(settings: ManagedSettings) -> dict[str, str]:
    """Return the environment of the server: this process's without what a launcher set, and the settings' own."""
    own = KINDS[settings.kind].environment(settings)
    return {**environment_without_launch(os.environ), **own, **settings.env}


def command_words(settings: ManagedSettings) -> list[str]:
    """Return the words of the command, the first as a path; raise `InputError` where there is no such program.

    Programs of the environment that `align` runs in are found although it may not be activated.
    """
    program, *words = settings.words
    folders = server_environment(settings).get("PATH", os.defpath)
    found = shutil.which(program, path=os.pathsep.join([folders, str(Path(sys.executable).parent)]))
    if found is None:
        title = KINDS[settings.kind].title
        raise InputError(
            f"no command {program!r} for {title}: install it in an environment of its own, and name its command here, "
            f"such as /opt/env/bin/{type(settings).model_fields['command'].default}",
            ("command",),
        )
    return [os.path.abspath(found), *words]


def engine_version(settings: ManagedSettings) -> str:
    """Return the version that the command prints; raise `InputError` where it is missing, fails or prints none."""
    words = [*command_words(settings), *KINDS[settings.kind].version]
    return _printed_version(tuple(words), frozenset(server_environment(settings).items()), settings.ready_s)


@cache
def _printed_version(words: tuple[str, ...], environment: frozenset[tuple[str, str]], timeout_s: float) -> str:
    output, status = _output(words, dict(environment), timeout_s)
    if status == 0 and (found := VERSION.findall(output)):
        return found[-1]
    last = one_line(output.strip().rpartition("\n")[2])[:MAX_SHOWN] or "nothing"
    raise InputError(f"`{' '.join(words)}` ends with status {status} and prints no version: {last}", ("command",))


def _output(words: tuple[str, ...], environment: Mapping[str, str], timeout_s: float) -> tuple[str, int]:
    """Return what a command prints, and its exit status."""
    shown = " ".join(words)
    try:
        ended = subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"`{shown}` does not end within {timeout_s:g} s", ("command",)) from error
    except OSError as error:
        raise InputError(f"`{shown}` cannot be started: {error.strerror}", ("command",)) from error
    return printable(ended.stdout.decode("utf-8", "replace")), ended.returncode
