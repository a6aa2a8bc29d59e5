"""What `RPOTrainer` checks before training, and the collator that adds rewards to its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from align.errors import InputError, RunError

KNOWN_TRL = ("1.16",)  # releases whose private methods and attributes used below were read and are tested
REWARDS = "rewards"  # key of the rewards in a batch
# Settings of DPOConfig that belong to TRL's own losses
TRL_LOSS_SETTINGS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
)


class RewardCollator:
    """Call a collator of preference data and add the rewards of the responses, shape [B, 2], under `rewards`."""

    def __init__(
        self, collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]], columns: Sequence[str]
    ) -> None:
        self.collator = collator
        self.columns = columns

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch; a reward that is not a finite number raises `InputError`."""
        rows = [[_reward(example, column) for column in self.columns] for example in examples]
        return {**self.collator(examples), REWARDS: torch.tensor(rows)}


def check_trl_version(installed: str) -> None:
    """Raise `RunError` if `RPOTrainer` is not known to work with this release of TRL.

    >>> check_trl_version("1.16.2")
    >>> check_trl_version("1.17.0")
    Traceback (most recent call last):
    align.errors.RunError: RPOTrainer supports trl 1.16, and 1.17.0 is installed; install 'trl==1.16.*' ...
    """
    release = ".".join(installed.split(".")[:2])
    if release not in KNOWN_TRL:
        raise RunError(
            f"RPOTrainer supports trl {', '.join(KNOWN_TRL)}, and {installed} is installed; "
            f"install 'trl=={KNOWN_TRL[-1]}.*' or a newer version of align"
        )


def check_loss_settings(config: Any) -> None:  # noqa: ANN401 - a DPOConfig, whose library takes seconds to import
    """Raise `InputError` for a setting of TRL's losses that was changed, because `RPOTrainer` does not read it."""
    for field in fields(config) if config is not None else ():
        if field.name in TRL_LOSS_SETTINGS:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(config, field.name)
            if value != default:
                raise InputError(
                    f"DPOConfig.{field.name} is {value!r}, and RPOTrainer does not read it; leave it out and configure "
                    "the loss instead: loss=preference_loss(name, beta=…)"
                )


def _reward(example: Mapping[str, Any], column: str) -> float:
    value = example.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{column} is {value!r} in a row of the dataset; it must be a finite number")
    return float(value)
