"""What every test stands on: one thread, so that tests can run beside each other, and no network."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited by commands that a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
