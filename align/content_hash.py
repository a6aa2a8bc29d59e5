"""Content hashes of what settings name: local files and folders, and a user's own modules."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from align.artifacts import fingerprint
from align.registry import module_file

GGUF = "gguf:"  # prefix of the path of a model in a GGUF file
PROCEDURAL = "tasks:"  # prefix of a source's path that names procedural tasks
STEP = "step:"  # prefix of a judge's setting that names a step's folder


def content_of(path: str) -> str:
    """Return the content hash of a local file or folder, or of the module that `module:name` names.

    A hub id, a built-in name or a server's name for a model is returned as it is.
    """
    if path.startswith((PROCEDURAL, STEP)) or not path:
        return path
    local = None
    with suppress(OSError, RuntimeError):  # not a path: too long, or the home of an unknown user
        candidate = Path(path.removeprefix(GGUF)).expanduser()
        local = candidate if candidate.exists() else None
    return code_of(path) if local is None else fingerprint(local)


def code_of(name: str) -> str:
    """Return the name, with the content hash of the module behind it where it is `module:name`."""
    code = None if name.startswith((PROCEDURAL, STEP, GGUF)) else module_file(name)
    return name if code is None else f"{name} {fingerprint(code)}"
