"""The work that a step computed, and the rate of this device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self

import torch

from align.accounting.flops import Decoder, Work, forward_flops, sum_work, total_flops
from align.models.loading.config import dimensions, load_config
from align.models.loading.pretrained import default_device

NOTHING = Work(0, 0, 0)
ELSEWHERE = "the model's dimensions are unknown: it runs on a server, or in an engine of the user's own"
FORMULA = "2 per weight and token, 4 per attended pair and unit of width; a backward pass is two forward passes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-products": torch.bfloat16}
# Side of the square matrices whose product measures the device's rate; a smaller one leaves a large GPU half idle
PRODUCT_SIDE, PRODUCT_SIDE_CUDA = 2048, 4096
SMALLEST_SIDE, SLOW_PRODUCT_S = 256, 0.02  # the side doubles until a product takes this long
PRODUCTS = 4  # timed; the first one is slower


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The work that a step computed."""

    dimensions: Decoder | str | None = None  # of its model, or why they are unknown; None if no model ran
    weights: int | None = None
    frozen: bool = False  # whether only adapters were trained, without gradients of the other weights
    tokens_trained: int = 0
    trained: Work = NOTHING  # forward and backward
    observed: Work = NOTHING  # forward alone
    others: tuple[tuple[Decoder | str, Work], ...] = ()  # forward passes of other models, with their dimensions
    devices: int = 1
    precision: str = "fp32"
    wire_bytes: int | None = 0
    device: str = "cpu"

    @classmethod
    def elsewhere(cls, *, devices: int) -> Self:
        """Return the work of models on a server or in a user's own engine, which is unknown."""
        return cls(dimensions=ELSEWHERE, devices=devices)

    @property
    def tokens_computed(self) -> int | None:
        """Return the tokens of all forward passes; None where a model ran elsewhere, which counts none."""
        works = [self.trained, self.observed, *(work for _, work in self.others)]
        return None if self.dimensions == ELSEWHERE else sum_work(works).tokens

    @property
    def flops(self) -> tuple[float | None, str]:
        """Return the FLOPs of all devices, and the formula that they are counted by. Judges are counted apart."""
        if isinstance(self.dimensions, str):
            return None, self.dimensions
        if self.dimensions is None:
            return 0.0, "no model ran"
        flops = total_flops(self.dimensions, trained=self.trained, observed=self.observed, frozen=self.frozen)
        for size, work in self.others:
            if isinstance(size, str):
                return None, size
            flops += forward_flops(size, work)
        return float(flops), FORMULA


def observing_done(ran: Sequence[tuple[Decoder | str, Work]]) -> Done:
    """Return the forward passes of models, each with its dimensions or why they are unknown."""
    if not ran:
        return Done()
    (size, work), *others = ran
    return Done(dimensions=size, observed=work, others=tuple(others), device=default_device())


def sampling_done(ran: Iterable[tuple[Path | str, Work]], precision: str) -> Done:
    """Return the forward passes of policies, each with the dimensions that its folder has."""
    sized = [(dimensions(load_config(str(folder))), work) for folder, work in ran]
    weights = [size.num_weights for size, _ in sized if not isinstance(size, str)]
    return replace(observing_done(sized), weights=max(weights, default=None), precision=precision)


@cache
def matrix_rate(device: str, precision: str) -> float:
    """Return the FLOP/s of a square matrix product in this process, the best of a few.

    The matrices are smaller where a product is slow, as in bf16 on a CPU without instructions for it.
    """
    largest = PRODUCT_SIDE_CUDA if device.startswith("cuda") else PRODUCT_SIDE
    side = SMALLEST_SIDE
    while side < largest and _product_s(side, device, precision) < SLOW_PRODUCT_S:
        side *= 2
    fastest_s = min(_product_s(side, device, precision) for _ in range(PRODUCTS))
    return 2 * side**3 / fastest_s


def _product_s(side: int, device: str, precision: str) -> float:
    """Return the seconds of one product of square matrices."""
    matrix = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    began = time.perf_counter()
    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
