"""Weights of a model as safetensors files, gathered and written a few at a time.

The files are those of transformers' `save_pretrained`, which needs all weights at once: their names, and the conversion
to the names and shapes of published files, are planned with tensors that hold no data.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from align.artifacts import write_json
from align.models.weights import WrittenWeights, combined_digest, tensor_digest

T = TypeVar("T")

SHARD_BYTES = 5 * 10**9  # of a file, unless a single tensor is larger; the default of huggingface_hub
FAILED_CONVERSION = (LookupError, RuntimeError, TypeError, ValueError)  # of some of the weights that belong together


class Gather:
    """How a save gets complete weights, and which process writes them. Here this process holds all of them."""

    is_main = True  # whether this process writes

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work on the process that writes, and return its result on every process."""
        return work()

    def complete(self, values: Sequence[Tensor]) -> AbstractContextManager[Sequence[Tensor]]:
        """Return a context with complete parameters and buffers; every process must enter it."""
        return nullcontext([value.detach() for value in values])


WHOLE = Gather()


def complete_shape(value: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter that may be sharded."""
    return tuple(getattr(value, "ds_shape", value.shape))  # ZeRO-3 empties parameters and keeps their shape here


def write_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype, gather: Gather = WHOLE) -> WrittenWeights:
    """Write the weights of a model, rounded to `dtype`, and return what identifies them; every process must call it.

    Besides one file, of at most `SHARD_BYTES` or one tensor, the writing process holds the weights that transformers
    converts together: one, or those of a layer, and during the conversion also the converted copies.
    """
    weights = model.state_dict(keep_vars=True)
    empty = {name: _without_data(value, dtype) for name, value in weights.items()}
    distinct = remove_tied_weights_from_state_dict(dict(empty), model)
    ignored = set(model._keys_to_ignore_on_save or ())  # pyright: ignore[reportPrivateUsage] - no public name
    converted = _convert(model, {name: value for name, value in distinct.items() if name not in ignored})
    split = split_torch_state_dict_into_shards(converted, max_shard_size=SHARD_BYTES)
    files = _Files(model, folder, dtype, split)
    for names in _parts(model, distinct, converted):
        with gather.complete([weights[name] for name in names]) as values:
            if gather.is_main:
                files.copy(names, values)
            del values  # which would keep them after the block
        gather.on_main(partial(files.write, ignored))
    parameters = sum(distinct[name].numel() for name in distinct if isinstance(weights[name], nn.Parameter))
    kept = {id(weights[name]): name for name in distinct}
    return gather.on_main(partial(files.finish, parameters, {name: kept[id(weights[name])] for name in weights}))


class _Files:
    """The files of a model's weights, each written as soon as it is complete."""

    def __init__(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype, split: StateDictSplit) -> None:
        self._model, self._folder, self._dtype, self._split = model, folder, dtype, split
        self._digests: dict[str, str] = {}
        self._copies: dict[str, Tensor] = {}
        self._begun: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)

    def copy(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Copy complete weights that transformers converts together."""
        self._copies = {name: _rounded(value, self._dtype) for name, value in zip(names, values, strict=True)}

    def write(self, ignored: Collection[str]) -> None:
        """Convert the copied weights, but for those that are `ignored`, and write the files that they complete."""
        self._digests |= {name: tensor_digest(value) for name, value in self._copies.items()}
        kept = [name for name in self._copies if name not in ignored]
        for name, value in _convert(self._model, {name: self._copies.pop(name) for name in kept}).items():
            file = self._split.tensor_to_filename[name]
            self._begun[file][name] = value.contiguous()
            if len(self._begun[file]) == len(self._split.filename_to_tensors[file]):
                save_file(self._begun.pop(file), self._folder / file, metadata={"format": "pt"})

    def finish(self, parameters: int, source_of: Mapping[str, str]) -> WrittenWeights:
        """Write the index if there are several files, and return what identifies the weights.

        `source_of` names, for each weight, the one that it is tied to, or itself.
        """
        assert not self._begun, f"incomplete: {', '.join(self._begun)}"
        if self._split.is_sharded:
            metadata = {"total_parameters": parameters, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            write_json(self._folder / SAFE_WEIGHTS_INDEX_NAME, index)
        digests = {name: self._digests[source] for name, source in source_of.items()}
        return WrittenWeights(combined_digest(digests), self._dtype)


def _parts(model: PreTrainedModel, distinct: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the smallest sets of weights that are converted to the same tensors as all together, in their order.

    These are single weights, the weights of layers, or all.
    """
    place = {name: position for position, name in enumerate(converted)}
    for key in (str, _layer, _all):
        parts: defaultdict[str, list[str]] = defaultdict(list)
        for name in distinct:
            parts[key(name)].append(name)
        try:
            made = {part: _convert(model, {name: distinct[name] for name in names}) for part, names in parts.items()}
        except FAILED_CONVERSION:
            continue
        found = [(name, value.shape) for values in made.values() for name, value in values.items() if name in place]
        if len(found) == len(place) and dict(found) == {name: value.shape for name, value in converted.items()}:
            order = {part: min((place.get(name, -1) for name in values), default=-1) for part, values in made.items()}
            return [parts[part] for part in sorted(parts, key=lambda part: order[part])]
    raise AssertionError("all weights together are converted as all weights are")


def _layer(name: str) -> str:
    """Return the name of the layer that a weight is in: up to the first number; else its own name."""
    found = re.match(r".*?\.\d+\.", name)
    return name if found is None else found.group()


def _all(name: str) -> str:
    """Return one and the same name for every weight."""
    return ""


def _convert(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to the names and shapes of the model's published files."""
    found = revert_weight_conversion(model, weights)
    # Views of one meta tensor would each be counted with all of its bytes
    return {name: torch.empty_like(value) if value.is_meta else value for name, value in found.items()}


def _without_data(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that has the shape of the complete one and the dtype that it is written in."""
    return torch.empty(complete_shape(value), dtype=dtype if value.is_floating_point() else value.dtype, device="meta")


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True)
