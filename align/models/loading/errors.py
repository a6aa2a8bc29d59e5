"""Errors of transformers and peft while loading, turned into one line."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from align.errors import InputError, one_line

# Exceptions that transformers and peft raise for invalid files and configurations
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError)
MAX_SHOWN = 300  # characters of a library's error message


@contextmanager
def loading(what: str, source: str, *loc: str) -> Generator[None]:
    """Turn a library's error in this block into an `InputError` at `loc`: cannot load `what` from `source`."""
    try:
        yield
    except InputError:
        raise
    except LOAD_ERRORS as error:
        raise InputError(f"cannot load {what} from {source!r}: {one_line(error)[:MAX_SHOWN]}", loc) from error
