"""Merge adapters into the weights under them, also where several layers share one weight (tied embeddings)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


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
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return is_tied and head is not None and head.weight is not embeddings.weight


def _record_untied(model: PreTrainedModel) -> None:
    """Record in the model and its configuration that no two layers share a weight."""
    configs: list[PretrainedConfig] = [model.config, model.config.get_text_config()]
    for config in configs:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
