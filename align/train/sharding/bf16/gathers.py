"""Half the bytes sent: weights that autocast rounds to bf16 before every use are gathered in bf16.

Only weights of linear layers are: norms, embeddings, experts and routers are gathered in fp32. A weight that was
gathered in bf16 is an fp32 tensor again in the forward pass, so that gradients are accumulated in fp32. They are
reduced over processes in bf16 only where `reduce_dtype` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.pytorch_utils import Conv1D

from align.models.backbone import Backbone

_preserve_version: Any = vars(torch.autograd)["_unsafe_preserve_version_counter"]  # FSDP2 uses it in the same place
_FUNCTIONS = vars(torch.distributed)
_reduce_scatter: Any = (
    _FUNCTIONS.get("reduce_scatter_single") or _FUNCTIONS["reduce_scatter_tensor"]
)  # before torch 2.13
LINEAR = (nn.Linear, Conv1D)  # not their subclasses, which may use their weights otherwise


def autocast_weights(policy: Backbone) -> list[str]:
    """Return the names of the weights that only linear layers use, and these only under autocast."""
    uses = [
        (value, type(module) in LINEAR) for module in policy.modules() for value in module.parameters(recurse=False)
    ]
    others = {id(value) for value, is_linear in uses if not is_linear}
    if policy.has_fp32_head:
        others |= {id(value) for value in policy.head.parameters()}
    if isinstance(policy.hf, PeftModel) and any(
        getattr(each, "use_dora", 0) for each in policy.hf.peft_config.values()
    ):
        return []  # the magnitudes of DoRA are computed from the weights in fp32
    # A bias may be added in fp32, as that of the LM head is
    return [
        name
        for name, value in policy.named_parameters()
        if id(value) not in others and value.is_floating_point() and len(getattr(value, "ds_shape", value.shape)) > 1
    ]


class Bf16Shard:
    """How FSDP2 gathers one parameter in bf16: the methods that it looks for on the local shard of a parameter."""

    def __init__(self, shard: Tensor) -> None:
        self._shard = shard

    @classmethod
    def install(cls, value: Tensor) -> None:
        """Let FSDP2 gather a sharded parameter in bf16; nothing may have gathered it before."""
        shard = cast(Any, value)._local_tensor  # `to_local` returns another object, on which FSDP2 looks for nothing
        methods = cls(shard)
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = methods.before, methods.after

    def before(
        self, mesh: DeviceMesh, size: torch.Size, stride: Sequence[int], module: nn.Module, policy: object
    ) -> tuple[tuple[Tensor, ...], torch.Size]:
        """Return what is gathered, padded to the rows of the first process, and the complete size."""
        shard = self._shard.detach()
        sent = shard.new_zeros(-(-size[0] // mesh.size()), *size[1:], dtype=torch.bfloat16)
        sent[: len(shard)] = shard
        return (sent,), size

    def after(
        self, gathered: tuple[Tensor, ...], size: torch.Size, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the complete weight in fp32, or write it to `out`, and free what was gathered."""
        (rounded,) = gathered
        full = rounded.new_empty(size, dtype=dtype) if out is None else out
        # As FSDP2 itself writes gathered weights: autograd may have saved them, and their values are the same again
        with torch.no_grad(), _preserve_version(full):
            full.copy_(rounded[: size[0]])
        rounded.untyped_storage().resize_(0)
        return (full, (full,)) if out is None else None


class Bf16ReduceScatter:
    """How FSDP2 reduces gradients in bf16: what it takes in place of its own reduce-scatter.

    Its `reduce_dtype` would also accumulate gradients over micro-batches in bf16.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor for gradients."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: torch.distributed.ProcessGroup,
        op: Any,  # noqa: ANN401 - torch has no public type for it
        async_op: bool = False,
    ) -> None:
        """Reduce gradients over processes; each gets its shard."""
        assert not async_op, "FSDP2 waits by means of streams"
        shard = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        _reduce_scatter(shard, input_tensor.bfloat16(), op=op, group=group)
        output_tensor.copy_(shard)
