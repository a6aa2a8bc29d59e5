"""Keys and values of a continuous batch, one storage slot per row, and attention over them.

Shape legend: S slots, A active rows, H query heads, G key heads, T prompt tokens, L positions, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "align_slots"  # name of the attention implementation
# Positions that the storage has at first, and that it grows by at most; until then it doubles. Each time it is copied.
FIRST_LENGTH, GROWTH = 64, 512
ALIGNED = 16  # fp32 numbers: if heads are as wide as a multiple of them, each starts at a multiple of 64 bytes
ROWS = 4  # MKL computes the last 1 to 3 fp32 rows of a product, and unaligned buffers, with other kernels


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent rows that attend to equally many keys."""

    rows: slice
    width: int  # keys


def runs_of(widths: Sequence[int]) -> Iterator[Run]:
    """Yield the runs of equal widths, in order.

    >>> [run.width for run in runs_of([128, 64, 64])]
    [128, 64]
    """
    start = 0
    for width, members in groupby(widths):
        stop = start + len(list(members))
        yield Run(slice(start, stop), width)
        start = stop


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `number`.

    >>> round_up(65, 64)
    128
    """
    return -(-number // multiple) * multiple


class SlotLayer(DynamicLayer):
    """Keys and values [S, G, L, D] of one layer.

    `update` writes one token per row of the current forward pass and returns the keys and values of these rows.
    """

    first: int  # slot of the first row of the forward pass
    positions_A: Tensor  # of the rows' new tokens
    width: int  # keys that are returned

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def fill(self, slots: slice, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values [1, G, T, D] of a sequence into each of the slots, from position 0."""
        length = keys.shape[-2]
        self._reserve(length, keys, values)
        self._keys[slots, :, :length], self._values[slots, :, :length] = keys, values

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` positions of some slots to others, all at once."""
        if self.is_initialized:
            for stored in (self._keys, self._values):
                stored[targets, :, :length] = stored[sources, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Write the new keys and values [A, G, 1, D] at the rows' positions; return those of the rows up to `width`."""
        self._reserve(self.width, key_states, value_states)
        used = slice(self.first, self.first + len(self.positions_A))
        slots_A = torch.arange(used.start, used.stop, device=self.positions_A.device)
        for stored, new in ((self._keys, key_states), (self._values, value_states)):
            stored[slots_A, :, self.positions_A] = new[:, :, 0]
        return self._keys[used, :, : self.width], self._values[used, :, : self.width]

    def get_seq_length(self) -> int:
        """Return 0: rows have no common length, and the model is given positions and masks."""
        return 0

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self._keys, self._values = (
                each.new_zeros(self._size, each.shape[1], round_up(length, FIRST_LENGTH), each.shape[3])
                for each in (keys, values)
            )
            self.is_initialized = True
        if length > (stored := self._keys.shape[2]):
            added = max(min(stored, GROWTH), round_up(length, FIRST_LENGTH) - stored)
            self._keys, self._values = (functional.pad(each, (0, 0, 0, added)) for each in (self._keys, self._values))


def slot_attention(  # noqa: PLR0913 - the signature is transformers' AttentionInterface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: Sequence[Run] = (),
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Return SDPA's output [A, 1, H, D], computed separately for each run; without runs call transformers' SDPA.

    The query heads that share a key head become rows of one product, so each key is read once, and no key is read that
    no row of the run attends to. On a CPU a single fp32 query head to a key head is computed without SDPA, which would
    need it padded to ROWS.
    """
    if not runs or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    (num_rows, num_heads, _, width), num_keys = query.shape, key.shape[1]
    grouped = query.reshape(num_rows, num_keys, num_heads // num_keys, width)
    is_single = grouped.shape[2] == 1 and query.dtype == torch.float32 and query.device.type == "cpu"
    attend: Any = functional.scaled_dot_product_attention
    if is_single and width % ALIGNED == 0:
        attend, padded = _attend, grouped
    else:
        padded = functional.pad(grouped, (0, 0, 0, -grouped.shape[2] % ROWS))
    outputs = [
        attend(
            padded[run.rows],
            key[run.rows, :, : run.width],
            value[run.rows, :, : run.width],
            attn_mask=attention_mask[run.rows, :, :, : run.width],
            scale=kwargs.get("scaling"),
        )
        for run in runs
    ]
    output = torch.cat(outputs)[:, :, : grouped.shape[2]].reshape(num_rows, 1, num_heads, -1)
    return output.contiguous(), None  # some models take views of it


def _attend(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, scale: float | None) -> Tensor:
    """Return attention [A, G, 1, D] of one query per key head."""
    scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.matmul(scaled, key.transpose(2, 3)).add_(attn_mask)
    return torch.matmul(scores.softmax(dim=-1), value)


AttentionInterface.register(ATTENTION, cast(Any, slot_attention))
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
