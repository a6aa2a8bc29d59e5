"""Warnings of libraries do not reach the user of a command; what matters in them does."""

import io
import logging
import re
import sys
import warnings
from contextlib import redirect_stderr
from inspect import getsource

import peft.tuners.tuners_utils
import pytest
import torch.cuda

from align.commands.console.quiet import MATTERS, quiet_libraries


def shown(*texts, category=UserWarning):
    """Return what is shown of warnings in a block."""
    out = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(out):
        warnings.simplefilter("always")
        with quiet_libraries():
            for text in texts:
                warnings.warn(text, category, stacklevel=1)
    return out.getvalue()


@pytest.mark.parametrize("category", [UserWarning, FutureWarning, DeprecationWarning, RuntimeWarning])
def test_a_warning_of_a_library_is_not_shown(category):
    assert shown("`is_gradient_checkpointing` is deprecated", category=category) == ""


def test_a_warning_of_a_logger_without_a_handler_is_not_shown():
    out = io.StringIO()
    logger = logging.Logger("a library")
    with redirect_stderr(out), quiet_libraries():
        logger.warning("advice")
    assert out.getvalue() == ""


def test_what_matters_is_one_line_and_said_once():
    text = "CUDA initialization: The NVIDIA driver on your system\nis too old"
    (line,) = shown(text, text).splitlines()
    assert line.startswith("the GPU cannot be used, and computation is on the CPU (CUDA initialization: The NVIDIA")


def test_warnings_are_as_before_after_the_block():
    before = warnings.showwarning, logging.lastResort.level
    with quiet_libraries():
        assert warnings.showwarning != before[0]
    assert (warnings.showwarning, logging.lastResort.level) == before


def test_who_asks_python_for_warnings_gets_them(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    before = warnings.showwarning
    with quiet_libraries():
        assert warnings.showwarning == before


def test_the_libraries_still_warn_of_what_matters_in_these_words():
    source = getsource(peft.tuners.tuners_utils) + getsource(torch.cuda)
    found = [part for part in MATTERS if re.search(part, source)]
    assert {"no module was matched", "Unsupported layer type"} <= set(found)
    assert any("CUDA capability" in part for part in found)
