"""The mark of tests that run programs in the sandbox; they are skipped where the machine has none."""

import pytest

from align.errors import InputError
from align.rewards.unit_tests import run_tests


def no_sandbox_reason():
    """Return why this machine has no sandbox, "" where it has one."""
    try:
        run_tests("", ["pass"])
    except InputError as error:
        return str(error)
    return ""


REASON = no_sandbox_reason()
needs_sandbox = pytest.mark.skipif(bool(REASON), reason=REASON)
