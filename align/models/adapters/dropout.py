"""Dropout of adapters that does not depend on how tokens are batched.

peft drops inputs of adapters by one stream of random numbers, so the result would depend on micro-batches, processes
and padding, and a resumed run could not repeat it. Here the mask of a token is a hash of the seed, the optimizer step,
the layer and the token's prefix. It is the same in a tree and in a padded batch, on any process, and when gradient
checkpointing recomputes a layer. The responses to a prompt share its masks, as they share its hidden states.
Shape legend: T rows of a batch, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from align.errors import InputError

# Constants of MurmurHash3's finalizer for 32 bits, as signed integers, and the golden ratio
MIX_1, MIX_2, GOLDEN = -2048144789, -1028477387, -1640531527
BITS = 24  # of a hash that decide whether a value is kept


class DropoutState:
    """The step whose masks are used, and the prefix hashes of the current batch; shared by all layers of a model."""

    def __init__(self) -> None:
        self.place: tuple[int, ...] | None = None  # seed and optimizer step; None while dropout is inactive
        self.key_T: Tensor | None = None  # int64

    @contextmanager
    def active(self, *place: int) -> Generator[None]:
        """Use the masks of a place within the block, given by the seed and the step."""
        self.place = place
        try:
            yield
        finally:
            self.place = None


class TokenDropout(nn.Module):
    """Drops values of a layer's input with probability `rate`, and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float, name: str, state: DropoutState) -> None:
        super().__init__()
        self.rate, self.name, self.state = rate, name, state

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, [..., D] with one row for each row of the batch."""
        place, key_T = self.state.place, self.state.key_T
        if place is None or not self.training:
            return inputs
        width = inputs.shape[-1]
        if key_T is None or inputs.numel() != len(key_T) * width:
            raise InputError(
                f"dropout is not supported in {self.name}, which does not run on all tokens of a batch; set it to 0",
                ("policy", "lora", "dropout"),
            )
        kept = keep_mask(key_T, width, self.rate, (*place, self.name)).view(inputs.shape)
        return inputs * kept.to(inputs.dtype) * (1 / (1 - self.rate))


def keep_mask(key_T: Tensor, width: int, rate: float, place: tuple[int | str, ...]) -> Tensor:
    """Return which values are kept, bool [T, D]: a hash of the row's key, the column and the place."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    salt = int.from_bytes(digest[:8], "little", signed=True)
    salted_T = key_T ^ salt
    seed_T = mixed_bits(_low_bits(salted_T ^ (salted_T >> 32)))
    columns_D = torch.arange(width, dtype=torch.int32, device=key_T.device) * GOLDEN
    hash_TD = mixed_bits(seed_T[:, None] + columns_D)
    return ((hash_TD >> (32 - BITS)) & ((1 << BITS) - 1)) >= round(rate * (1 << BITS))


def mixed_bits(values: Tensor) -> Tensor:
    """Return MurmurHash3's finalizer of int32 values."""
    mixed = (values ^ ((values >> 16) & 0xFFFF)) * MIX_1
    mixed = (mixed ^ ((mixed >> 13) & 0x7FFFF)) * MIX_2
    return mixed ^ ((mixed >> 16) & 0xFFFF)


def _low_bits(values: Tensor) -> Tensor:
    """Return the low 32 bits of int64 values as int32."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def install_dropout(model: nn.Module) -> DropoutState | None:
    """Replace peft's dropout in the adapters of a model; return the shared state, or None without dropout."""
    if not isinstance(model, PeftModel):
        return None
    state = DropoutState()
    found = False
    for name, module in model.get_base_model().named_modules():
        layers: Any = module.lora_dropout if isinstance(module, LoraLayer) else {}
        for adapter, layer in list(layers.items()):
            if isinstance(layer, nn.Dropout):
                layers[adapter] = TokenDropout(layer.p, f"{name}.{adapter}", state)
                found = True
    return state if found else None
