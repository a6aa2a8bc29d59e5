"""Errors of transformers and peft while loading, turned into one line."""

from __future__ import annotations

import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from align.errors import InputError, RunError, one_line
from align.storage.disk_errors import UNREADABLE, error_code

# Exceptions that transformers, peft and gguf raise for invalid files, impossible values and missing libraries
LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    struct.error,
)
MAX_SHOWN, MAX_NAME = 300, 200  # characters of a library's error message, and of a path


@contextmanager
def loading(what: str, source: str, *loc: str) -> Generator[None]:
    """Turn a library's error in this block into an `InputError` at `loc`: cannot load `what` from `source`.

    A file that exists and cannot be read is a `RunError`.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except LOAD_ERRORS as error:
        name = repr(source if len(source) <= MAX_NAME else f"{source[:MAX_NAME]}…")
        if "/" in source and ":" not in source and not Path(source).exists():
            name += " (no such folder here)"  # what follows is about the Hub
        reason = one_line(error)[:MAX_SHOWN] or type(error).__name__
        if error_code(error) in UNREADABLE:
            raise RunError(f"cannot load {what} from {name}: {reason}") from error
        raise InputError(f"cannot load {what} from {name}: {reason}", loc) from error
