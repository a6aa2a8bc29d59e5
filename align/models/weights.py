"""Parameters that ZeRO-3 or FSDP2 shard, and the fingerprint of a model's weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models.backbone import Backbone

BLOCK = 1 << 22  # numbers of a tensor that are hashed at a time


@contextmanager
def gathered_parameters(parameters: Sequence[Tensor]) -> Generator[None]:
    """Gather parameters that ZeRO-3 partitions for the length of the block; every process must enter it."""
    partitioned = [value for value in parameters if hasattr(value, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415 - optional, and takes seconds to import

    with GatheredParameters(partitioned):
        yield


def full_tensor(value: Tensor) -> Tensor:
    """Return the full value of a parameter that FSDP2 shards, or the tensor itself; every process must call it."""
    return cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value


def castable_parameters(model: nn.Module, base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each parameter that `from_pretrained(dtype=...)` casts: those not kept in fp32.

    `base` is the transformers model inside `model`, or the model itself.
    """
    fp32_patterns = base._keep_in_fp32_modules_strict or ()  # pyright: ignore[reportPrivateUsage] - no public name
    for name, value in model.named_parameters():
        # matched as in transformers' loader
        is_kept = any(re.search(pattern.replace("*", ".*"), name) for pattern in fp32_patterns)
        if value.is_floating_point() and not is_kept:
            yield name, value


def fingerprint(model: Backbone) -> str:
    """Return sixteen hex digits that depend on the value of every weight, adapters included.

    They do not depend on how the weights are sharded. Every process must call it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.hf.state_dict(keep_vars=True).items()):
        with gathered_parameters([value]):
            full = full_tensor(value.detach()).cpu()
            digest.update(f"{name} {full.dtype} {tuple(full.shape)}".encode())
            _update(digest, full)
    for name, module in model.hf.named_modules():
        if isinstance(module, LoraLayer):  # the scaling of its adapters is not among the weights
            digest.update(f"{name} {sorted(module.scaling.items())}".encode())
    return digest.hexdigest()[:16]


class WrittenWeights(NamedTuple):
    """The weights of a saved model: a SHA-256 of their values, and the dtype that they were rounded to."""

    digest: str
    dtype: torch.dtype


def written_weights(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> WrittenWeights:
    """Return what identifies tensors that were rounded to `dtype`; the digest is over their values in fp32."""
    return WrittenWeights(combined_digest({name: tensor_digest(value) for name, value in weights.items()}), dtype)


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return a SHA-256 of the names and the digests of tensors."""
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def tensor_digest(value: Tensor) -> str:
    """Return a SHA-256 of a tensor's shape and values, in fp32 if they are floating point."""
    digest = hashlib.sha256(f"{tuple(value.shape)}".encode())
    for block in value.detach().flatten().split(BLOCK):  # so that a copy of the whole tensor is never made
        known = block.to("cpu")
        _update(digest, known.float() if known.is_floating_point() else known)
    return digest.hexdigest()


def _update(digest: Any, value: Tensor) -> None:  # noqa: ANN401 - hashlib has no public type for it
    """Add a tensor's bytes to a digest."""
    digest.update(memoryview(cast(Any, value.flatten().view(torch.uint8).numpy())))
