"""What every test relies on: one thread, so that tests can run beside each other, no network, and a clock to set."""

import os
import signal
import time

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited by commands that a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def forked_launches(monkeypatch):
    """Fork the processes of the steps that pipelines launch: what is tested is not how Python starts."""
    from forked import fork_launches  # noqa: PLC0415 - imports align, which few tests need before their own imports

    fork_launches(monkeypatch)
