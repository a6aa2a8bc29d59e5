"""Memory of this machine's GPUs: given back before a server starts, and waited for after it has stopped."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import torch

WAIT_S = 60.0  # for memory that the driver has not given back yet
POLL_S = 0.5
SLACK_BYTES = 256 << 20  # of a difference that does not count


def release_memory() -> None:
    """Free what this process no longer uses: objects in cycles, and torch's cache on the GPU."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_memory(num_gpus: int) -> list[int]:
    """Return the free bytes of the first GPUs that this process sees; none without a GPU."""
    count = min(num_gpus, torch.cuda.device_count()) if torch.cuda.is_available() else 0
    return [torch.cuda.mem_get_info(device)[0] for device in range(count)]


def missing_memory(before: Sequence[int], wait_s: float = WAIT_S) -> int:
    """Wait until as many bytes are free as before; return how many are missing on a GPU at the end, 0 if none."""
    deadline = time.monotonic() + wait_s
    while True:
        lacks = [then - now for then, now in zip(before, free_memory(len(before)), strict=True)]
        most = max((lack for lack in lacks if lack > SLACK_BYTES), default=0)
        if not most or time.monotonic() > deadline:
            return most
        time.sleep(POLL_S)
