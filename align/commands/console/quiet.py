"""Hide warnings and progress bars of libraries; print one line for those that matter."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager

# Read by the libraries when they are imported, here and in launched processes
VERBOSITY = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}
BARS = "TQDM_DISABLE"
# Part of a warning -> what it means for a run
MATTERS = {
    r"CUDA initialization": "the GPU cannot be used, and computation is on the CPU",
    r"CUDA capability|not compatible with the current PyTorch": "this PyTorch does not support the GPU",
    r"no module was matched": "some targets of the adapters match no module",
    r"Unsupported layer type": "adapters are on a layer that peft does not support",
    r"4-bit linear may get different": "adapters merged into 4-bit weights change the outputs by rounding",
}


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Show no warning of a library within the block, but one line for each that matters to a run.

    Python's option -W and PYTHONWARNINGS show them all. Without a terminal there are no progress bars of libraries.
    """
    for name, value in VERBOSITY.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault(BARS, "1")
    if sys.warnoptions:
        yield
        return
    told = set[str]()

    def show(message: Warning | str, *_: object) -> None:
        text = " ".join(str(message).split())
        meaning = next((MATTERS[part] for part in MATTERS if re.search(part, text)), None)
        if meaning is not None and meaning not in told:
            told.add(meaning)
            sys.stderr.write(f"{meaning} ({text})\n")

    before, logs = warnings.showwarning, logging.lastResort  # which prints the warnings of loggers without a handler
    assert logs is not None
    level = logs.level
    warnings.showwarning = show
    logs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.showwarning = before
        logs.setLevel(level)
