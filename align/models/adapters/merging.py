"""Merge adapters into the weights under them, also where several layers share one weight (tied embeddings).

Sharded weights are merged one at a time while the model is saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from align.models.saving.weights import WHOLE, Gather, complete_shape

T = TypeVar("T")
BASE = "base_layer."  # prefix of the names that the parameters under an adapter have in its layer


def merge_to_save(model: PeftModel, gather: Gather) -> tuple[PreTrainedModel, Gather]:
    """Return the model without its adapters and a gather whose complete weights have them merged.

    Complete weights are merged in place. Sharded ones stay as they are, and the returned gather merges each while it is
    completed; until then a tensor without data stands for it in the model.
    """
    if gather is WHOLE:
        return merge_and_untie(model), gather
    base = cast(PreTrainedModel, model.get_base_model())
    is_untied = bool(tied_targets(model))
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    adapted = {id(stand_in): weight for layer in layers for stand_in, weight in _replace_weights(layer)}
    base = cast(PreTrainedModel, cast(Any, model).unload())
    if is_untied or _has_untied_head(base):
        _record_untied(base)
    return base, _MergingGather(gather, adapted)


def merge_and_untie(model: PeftModel) -> PreTrainedModel:
    """Return the model with its adapters merged into its weights, in place.

    An adapter changes one layer only. If that layer shares its weight with another one, as the embeddings do with the
    LM head of a tied model, each gets its own weight first, and the configuration says that they are not tied.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    tied = tied_targets(model)
    for name in tied:
        module = base.get_submodule(name)
        weight = cast(nn.Parameter, module.weight)
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    with warnings.catch_warnings():  # peft warns that the embeddings are no longer tied
        warnings.simplefilter("ignore", UserWarning)
        merged = cast(PreTrainedModel, cast(Any, model).merge_and_unload())
    if tied or _has_untied_head(merged):
        _record_untied(merged)
    return merged


def tied_targets(model: PeftModel) -> list[str]:
    """Return the names of the layers under adapters whose weight another layer uses too."""
    modules = list(model.get_base_model().named_modules())
    users: dict[int, int] = {}
    for _, module in modules:
        for weight in module.parameters(recurse=False):
            users[id(weight)] = users.get(id(weight), 0) + 1
    return [f"{name}.base_layer" for name, weight in _adapted_weights(modules) if users[id(weight)] > 1]


def _adapted_weights(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in modules:
        if isinstance(module, BaseTunerLayer):
            weight = getattr(module.get_base_layer(), "weight", None)
            if isinstance(weight, nn.Parameter):
                yield name, weight


def _has_untied_head(model: PreTrainedModel) -> bool:
    """Return whether a model that is configured as tied has two weights, as after training a copy of one of them."""
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return is_tied and head is not None and head.weight is not embeddings.weight


def _record_untied(model: PreTrainedModel) -> None:
    """Record in the model and its configuration that no two layers share a weight."""
    configs: list[PretrainedConfig] = [model.config, model.config.get_text_config()]
    for config in configs:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


@dataclass(frozen=True, slots=True)
class _AdaptedWeight:
    """A weight under adapters, and what merging them needs: parameters of their layer, which may be sharded."""

    layer: BaseTunerLayer
    name: str  # of the weight in the layer
    parameters: Mapping[str, Tensor]  # by name in the layer

    @torch.no_grad()
    def merged(self, complete: Mapping[str, Tensor]) -> Tensor:
        """Return the weight with its adapters merged by peft; `complete` are the parameters, which may be changed."""
        functional_call(_Merge(self.layer), {f"layer.{name}": value for name, value in complete.items()})
        return complete[self.name]


class _Merge(nn.Module):
    """Merges the adapters of a layer in its forward pass, for which `functional_call` replaces parameters."""

    def __init__(self, layer: BaseTunerLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> None:
        self.layer.merge()
        self.layer.merged_adapters.clear()


def _replace_weights(layer: BaseTunerLayer) -> Iterator[tuple[nn.Parameter, _AdaptedWeight]]:
    """Replace the weights that merging would change by tensors without data; yield these with what they stand for."""
    module = layer.get_base_layer()
    parameters = dict(cast(nn.Module, layer).named_parameters())
    names = [getattr(layer, "parameter_name", "weight")]
    names += ["bias"] if any(getattr(layer, "lora_bias", {}).values()) else []
    own = {name: value for name, value in parameters.items() if not name.startswith(BASE)}
    changed = {name: known for name in names for known in parameters if parameters[known] is getattr(module, name)}
    assert len(changed) == len(names), f"{type(layer).__name__}: {', '.join(names)} are not all parameters"
    under = {known: parameters[known] for known in changed.values()}
    for name, known in changed.items():
        value = under[known]
        empty = torch.empty(complete_shape(value), dtype=value.dtype, device="meta")
        stand_in = nn.Parameter(empty, requires_grad=value.requires_grad)
        setattr(module, name, stand_in)
        yield stand_in, _AdaptedWeight(layer, known, own | under)


class _MergingGather(Gather):
    """Merges adapters into weights as they are completed: on the CPU of the process that writes, one at a time."""

    def __init__(self, gather: Gather, adapted: Mapping[int, _AdaptedWeight]) -> None:
        self._gather = gather
        self._adapted = adapted
        self.is_main = gather.is_main

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work on the process that writes, and return its result on every process."""
        return self._gather.on_main(work)

    @contextmanager
    def complete(self, values: Sequence[Tensor]) -> Generator[Sequence[Tensor]]:
        """Yield complete parameters and buffers, merged on the process that writes."""
        known = {id(value): self._merged(self._adapted[id(value)]) for value in values if id(value) in self._adapted}
        others = [value for value in values if id(value) not in known]
        with self._gather.complete(others) as complete:
            known |= {id(value): full for value, full in zip(others, complete, strict=True)}
            yield [known[id(value)] for value in values]

    def _merged(self, weight: _AdaptedWeight) -> Tensor:
        complete = self._copied(weight.parameters)
        return weight.merged(complete) if self.is_main else torch.empty(0)

    def _copied(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return complete copies of parameters on the process that writes, and release what was gathered."""
        with self._gather.complete(list(parameters.values())) as complete:
            pairs = zip(parameters.items(), complete, strict=True)
            return {name: full.to("cpu", value.dtype, copy=True) for (name, value), full in pairs if self.is_main}
