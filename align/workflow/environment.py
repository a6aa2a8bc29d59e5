"""Provenance of a step for its manifest: host, hardware, time, command, git commit."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from align.redaction import SECRET_NAME, redact

CPU_INFO = Path("/proc/cpuinfo")  # Linux
# In an argument of a command; a tokenizer and numbers of tokens, such as max_new_tokens=64, are none
SECRET = re.compile(rf"(?!tokenizer\b|tokens\w*=\d+(?!\S))((?:{SECRET_NAME.pattern})[^=\s]*=)\S+", re.IGNORECASE)


def environment() -> dict[str, Any]:
    """Return the time, host, hardware, command and git commit of this process; None for what is unknown."""
    commit = _git("rev-parse", "HEAD")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": device_name(),
        "hardware": hardware(),
        "command": redact(command_line(sys.argv)),
        "git_commit": commit,
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
    }


def device_name() -> str:
    """Return the name of the first GPU, else of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def hardware() -> dict[str, Any]:
    """Return the CPU's name, the names of the kinds of GPUs, and without GPUs the cores that this process may use.

    Containers get another host name each time they start, and keep their hardware. A launch may restrict each process
    to the cores near its GPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = {torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())}
    return {"cpu": _cpu_name(), "cores": None if gpus else cores, "gpus": sorted(gpus)}


def _cpu_name() -> str:
    lines = CPU_INFO.read_text("utf-8").splitlines() if CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def command_line(arguments: list[str]) -> str:
    """Return the command that was given, without the folder of the program and without the values of secrets."""
    program = Path(arguments[0]).name
    program = "python -m align" if program == "__main__.py" else program
    return " ".join([program, *(shlex.quote(SECRET.sub(r"\1***", argument)) for argument in arguments[1:])])


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the working directory, or None if it has no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
