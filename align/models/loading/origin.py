"""What a model's configuration said before it was changed for training: dropout, and the dtype of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

ATTRIBUTE = "align_origin"  # of the transformers model
RATES = ("drop", "jitter")  # parts of the names of dropout rates and router noise


class Origin(NamedTuple):
    """Values of a configuration by their keys in config.json, and the dtype of the weights."""

    rates: Mapping[tuple[str, ...], float]
    dtype: torch.dtype


def remove_randomness(config: PretrainedConfig) -> Origin:
    """Set every dropout rate and router jitter to 0, in place, and return what the configuration said before.

    Policy and reference must agree before the first update.
    """
    text = config.get_text_config()
    nested = next((name for name, value in vars(config).items() if value is text), None)
    parts: dict[tuple[str, ...], PretrainedConfig] = {(): config}
    if text is not config and nested is not None:
        parts[(nested,)] = text
    rates: dict[tuple[str, ...], float] = {}
    for place, part in parts.items():
        for name, value in part.to_dict().items():
            if any(word in name for word in RATES) and isinstance(value, float):
                rates[(*place, name)] = value
                setattr(part, name, 0.0)
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return Origin(rates, dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32)


def set_origin(model: PreTrainedModel, origin: Origin) -> PreTrainedModel:
    """Remember where a model comes from, for its saving."""
    setattr(model, ATTRIBUTE, origin)
    return model


def origin_of(model: PreTrainedModel) -> Origin:
    """Return where a model comes from; for one that `align` did not load, its own configuration."""
    known = cast("Origin | None", getattr(model, ATTRIBUTE, None))
    return known or Origin({}, model.dtype)


def restored(values: dict[str, Any], origin: Origin, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of a config.json with the values of its origin, and with the dtype of its weights."""
    for (*place, name), rate in origin.rates.items():
        part = values
        for each in place:
            part = cast("dict[str, Any]", part.get(each, {}))
        if name in part:
            part[name] = rate
    return values | {"dtype": str(dtype).removeprefix("torch.")}
