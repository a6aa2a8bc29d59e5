"""Measured memory of this process, and the memory of its GPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS, KIB = Path("/proc/self/status"), 1024


def gpu_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():  # preferred because it can be reset, unlike `ru_maxrss`
        peak = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) * KIB
    unit = 1 if sys.platform == "darwin" else KIB  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
