"""Stochastic rounding to bf16, reproducible on every device.

A value between two neighbours in bf16 becomes the upper one with a probability that equals its position between them,
so that the result is right on average. Rounding to nearest would lose every update of less than half the distance,
which is 1/512 to 1/256 of a weight: Gupta et al. 2015, arXiv:1502.02551, sec. 3; for bf16, Zamirai et al. 2020,
arXiv:2010.06192.

The random numbers are a hash of the place (seed, optimizer step and parameter name) and of the element's position. They
are integers, so every device draws the same ones, whatever it rounds at a time.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from align.models.adapters.dropout import GOLDEN, mixed_bits

DROPPED_BITS = 16  # of an fp32 number's mantissa that bf16 lacks
BLOCK = 1 << 22  # elements rounded at a time, which bounds the memory of the integers


def round_stochastically(values: Tensor, place: tuple[int | str, ...], *, out: Tensor) -> None:
    """Round fp32 values to bf16 into `out`, a contiguous tensor of the same shape.

    The expected result is the value itself, and values that bf16 represents are unchanged.
    """
    flat = values.reshape(-1)
    rounded = out.view(-1)
    digest = hashlib.sha256(repr(place).encode()).digest()
    keys = [int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4)]
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        position = torch.arange(start, start + len(block), device=values.device).to(torch.int32)
        noise = mixed_bits(mixed_bits(position * GOLDEN + keys[0]) ^ keys[1]) & ((1 << DROPPED_BITS) - 1)
        # Adding to the bits adds to the magnitude; the carry out of the dropped bits decides between the neighbours
        bits = ((block.view(torch.int32) + noise) >> DROPPED_BITS) << DROPPED_BITS
        rounded[start : start + BLOCK] = torch.where(block.isfinite(), bits.view(torch.float32), block)
