"""Sequence parallelism: processes that split the rows of a tree, and its heads around attention.

Each process computes a slice of the rows. An all-to-all before attention gives it all rows of a slice of the heads, and
another one afterwards gives it its own rows with all heads (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509).

Shape legend: P processes, H heads, T rows of the tree, L rows of a process, D head width, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.distributed.launch_files import SEQUENCE_PARALLEL
from align.errors import InputError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The processes that split the rows of each tree. All of them call the methods together, with the same tree."""

    group: dist.ProcessGroup
    rank: int  # of this process within the group
    size: int

    def rows(self, num_rows: int) -> slice:
        """Return the rows of this process; the last ones of the group may lie behind the tree and are padding."""
        length = -(-num_rows // self.size)
        return slice(self.rank * length, (self.rank + 1) * length)

    def to_heads(self, heads: Sequence[Tensor], num_rows: int) -> list[Tensor]:
        """Return each [1, H, L, D] as [1, H / P, T, D]: the heads of this process in all rows, without padding."""
        for each in heads:
            if each.shape[1] % self.size:
                raise InputError(f"{each.shape[1]} heads cannot be split over {self.size} processes", SEQUENCE_PARALLEL)
        sent = [each.reshape(self.size, -1) for each in heads]
        received = self._exchange(torch.cat(sent, dim=1)).split([each.shape[1] for each in sent], dim=1)
        shapes = [(self.size, each.shape[1] // self.size, *each.shape[2:]) for each in heads]
        own = [each.reshape(shape).transpose(0, 1).flatten(1, 2) for each, shape in zip(received, shapes, strict=True)]
        return [each[None, :, :num_rows] for each in own]

    def to_rows(self, output: Tensor) -> Tensor:
        """Return [1, T, H / P, D] as [1, L, H, D]: the rows of this process with all heads, and 0 in padding."""
        length = -(-output.shape[1] // self.size)
        padded = nn.functional.pad(output[0], (0, 0, 0, 0, 0, self.size * length - output.shape[1]))
        received = self._exchange(padded.reshape(self.size, -1)).reshape(self.size, length, *output.shape[2:])
        return received.transpose(0, 1).flatten(1, 2)[None]

    def gather(self, values: Tensor, targets: Tensor, number: int) -> Tensor:
        """Return the values [..., N] of all `number` targets, given those of this process, whose indices are `targets`.

        Every process computes the same loss from the result, so the gradient of a process's own values is that of its
        own loss: parameter gradients of one process are those of its rows, and their sum is that of the whole tree.
        """
        return cast(Tensor, _Gather.apply(values, targets, number, self.group))

    def _exchange(self, blocks: Tensor) -> Tensor:
        """Send block p of [P, ...] to process p, and return the blocks that the processes have sent to this one."""
        return cast(Tensor, _Exchange.apply(blocks, self.group))


class _Exchange(torch.autograd.Function):
    """An all-to-all; its own transpose."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401 - autograd's context
        ctx.group = group
        received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, blocks.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
        return _Exchange.forward(ctx, grads[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, targets: Tensor, number: int, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(targets)
        found = values.new_zeros(*values.shape[:-1], number)
        found[..., targets] = values
        dist.all_reduce(found, group=group)  # exact: every other process adds 0
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
        return grads[0][..., ctx.saved_tensors[0]], None, None, None
