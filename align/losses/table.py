"""The table of preference losses, and user-defined losses by dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.losses.distances import (
    Distance,
    apo_down,
    apo_zero,
    backward_kl,
    exo,
    forward_kl,
    hinge,
    ipo,
    logistic,
    odds_ratio,
    robust,
    squared,
    top_choice,
)
from align.losses.preference import PreferenceLoss, full_mask
from align.losses.unpaired import UnpairedLoss
from align.registry import LazyModule, UserCode, import_dotted, pick, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")  # a recipe's loss is validated without it

TOP_CHOICE = Distance(top_choice, listwise=True)
LOGISTIC = Distance(logistic, settings=("label_smoothing", "gamma"))
IPO = Distance(ipo, settings=("beta",))
ROBUST = Distance(robust, settings=("label_smoothing",))
BACKWARD_KL = Distance(backward_kl, uses_rewards=True, listwise=True)
FORWARD_KL = Distance(forward_kl, uses_rewards=True, listwise=True)
SQUARED = Distance(squared, uses_rewards=True, listwise=True)

# Defaults of beta: rpo_* from NeMo-Aligner's gpt_dpo.yaml (the paper gives a range), dpo_norm from Tülu 3 (Lambert et
# al. 2024), simpo and its gamma from the paper's Llama-3-8B-Base run, orpo from the paper's lambda, others as dpo. No
# paper gives a default for label_smoothing; 0.1 is a choice of this project, and the 0.001 of exo that of TRL.
LOSSES: dict[str, PreferenceLoss | UnpairedLoss] = {
    "dpo": PreferenceLoss(TOP_CHOICE),
    "dpo_norm": PreferenceLoss(TOP_CHOICE, beta=5.0, per_token=True),
    "cdpo": PreferenceLoss(LOGISTIC, label_smoothing=0.1, pairs="all"),
    "robust": PreferenceLoss(ROBUST, label_smoothing=0.1, pairs="all"),
    "ipo": PreferenceLoss(IPO, pairs="all"),
    "ipo_norm": PreferenceLoss(IPO, pairs="all", per_token=True),
    "exo": PreferenceLoss(Distance(exo, settings=("label_smoothing",)), label_smoothing=1e-3, pairs="all"),
    "apo_zero": PreferenceLoss(Distance(apo_zero), pairs="all"),
    "apo_down": PreferenceLoss(Distance(apo_down), pairs="all"),
    "hinge": PreferenceLoss(Distance(hinge), pairs="all"),
    "simpo": PreferenceLoss(LOGISTIC, beta=2.0, gamma=1.0, pairs="all", per_token=True, reference_free=True),
    "cpo": PreferenceLoss(LOGISTIC, pairs="all", reference_free=True),
    "orpo": PreferenceLoss(Distance(odds_ratio, settings=("beta",)), pairs="all", per_token=True, reference_free=True),
    "rpo_bwd_kl": PreferenceLoss(BACKWARD_KL, beta=0.2),
    "rpo_fwd_kl": PreferenceLoss(FORWARD_KL, beta=0.2),
    "rpo_sq": PreferenceLoss(SQUARED, beta=0.2),
    "kto": UnpairedLoss(),
    "apo_zero_unpaired": UnpairedLoss(uses_kl=False),
}


TENSORS = ("policy_logps_BK", "reference_logps_BK", "rewards_BK", "lengths_BK", "mask_BK")  # arguments of a loss
TRL_NAMES = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo"}  # those that differ


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """A user's loss function with the attributes and methods that a trainer expects of a `PreferenceLoss`.

    Its beta is unknown, so its implicit rewards are plain log-ratios.
    """

    function: Callable[..., Any]  # of TENSORS; returns loss_B
    uses_rewards: bool = True
    uses_reference: bool = True
    path: str = ""  # of the user's function, `package.module:function`, and the settings that it was given
    given: Mapping[str, object] = field(default_factory=dict[str, object])

    def __call__(
        self,
        policy_logps_BK: Tensor,
        reference_logps_BK: Tensor,
        rewards_BK: Tensor,
        lengths_BK: Tensor,
        mask_BK: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each group, shape [B]."""
        return self.function(policy_logps_BK, reference_logps_BK, rewards_BK, lengths_BK, mask_BK)

    def implicit_rewards(
        self, policy_logps_BK: Tensor, reference_logps_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None
    ) -> Tensor:
        """Return the log-ratio of each response, shape [B, K]; 0 where the mask is False."""
        mask_BK = full_mask(policy_logps_BK) if mask_BK is None else mask_BK.bool()
        return torch.where(mask_BK, policy_logps_BK - reference_logps_BK, 0)


Loss = PreferenceLoss | UnpairedLoss | CustomLoss


def preference_loss(name: str, **settings: object) -> Loss:
    """Return the loss called `name` in `LOSSES` with the given settings, or a user's loss.

    `name` may be a dotted path `package.module:function`: a function of the same five tensors as
    `PreferenceLoss.__call__`, which takes settings as keywords, or a factory, which is called with the settings and
    returns such a function, a `PreferenceLoss` or an `UnpairedLoss`.

    Raises `InputError` for an unknown name, an unknown setting, or a value out of range.

    >>> preference_loss("rpo_bwd_kl", eta=2.0).beta
    0.2
    >>> preference_loss("dpo", eta=2.0)
    Traceback (most recent call last):
    align.errors.InputError: loss 'dpo' has no setting 'eta'; did you mean 'beta'? available: beta, length_penalty, ...
    """
    if ":" in name:
        return _custom_loss(name, settings)
    if name in TRL_NAMES:
        raise InputError(f"no preference loss is called {name!r}; TRL's {name} is called {TRL_NAMES[name]!r} here")
    loss = pick(LOSSES, name, "preference loss")
    for setting in settings:
        if setting not in loss.settings:
            raise InputError(f"loss {name!r} has no setting {setting!r}; {suggest(setting, loss.settings)}")
    try:
        return replace(loss, **settings)
    except InputError as error:
        raise InputError(f"loss {name!r}: {error}") from None


def _custom_loss(path: str, settings: dict[str, object]) -> Loss:
    made = import_dotted(path, "preference loss")
    code = UserCode("preference loss", path)
    error = _refusal(made, settings)
    if error is None:
        loss: Any = code.call(made, **settings)
    elif _refusal(made, settings, *TENSORS) is None:
        loss = partial(made, **settings)
    else:
        raise InputError(f"preference loss {path!r} does not accept the settings {settings}: {error}") from error
    if not callable(loss):
        raise InputError(f"preference loss {path!r} must return a function that returns loss_B, not {loss!r}")
    if isinstance(loss, PreferenceLoss | UnpairedLoss):
        return loss
    custom = loss if isinstance(loss, CustomLoss) else CustomLoss(loss)
    return replace(custom, function=partial(code.call, custom.function), path=path, given=settings)


def _refusal(function: Callable[..., object], settings: dict[str, object], *tensors: str) -> TypeError | None:
    """Return why a function cannot be called with the settings after the tensors; None if it can be."""
    try:
        inspect.signature(function).bind(*tensors, **settings)
    except TypeError as error:
        return error
    return None
