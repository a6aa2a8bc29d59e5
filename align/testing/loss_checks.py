"""Check a preference loss: its mathematical properties, then 20 optimizer steps on a tiny policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from align.losses.preference import PreferenceLoss
from align.losses.unpaired import UnpairedLoss
from align.testing.loss_inputs import LossInputs, shrink
from align.testing.loss_properties import Check, Property, loss_properties
from align.testing.loss_training import NUM_STEPS, train_tiny_policy

# What a user's function may raise when an input does not suit it; reported as a failure of the property.
LOSS_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
REFERENCE_POINT = 0.5  # nats, of a loss that needs an estimate of the KL divergence
LOG_WEIGHT = -0.25  # of every response, for a loss with weights
LEAST_CHANGE = 1e-6  # of a held-out mean, to count as a change

LEARNS = ("learns", f"{NUM_STEPS} steps on a tiny policy lower the held-out loss")
PREFERS_BEST = ("prefers_best", f"{NUM_STEPS} steps raise the best response over the worst one")


@dataclass(frozen=True, slots=True)
class PropertyResult:
    """The result of one property of a loss.

    `detail` says what was measured where it passed, what is wrong and the smallest counterexample found where it
    failed, and why it was not checked where it was skipped.
    """

    name: str
    promise: str
    status: Literal["passed", "failed", "skipped"]
    detail: str = ""

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.status:<7} {self.name:<14} {self.promise}" + (f": {self.detail}" if self.detail else "")


def check_loss(loss: Callable[..., Tensor]) -> list[PropertyResult]:
    """Check every property that `align` and its trainer rely on, one result each; takes about a second.

    `loss` is made by `preference_loss`, or any function
    `(policy_logps_BK, reference_logps_BK, rewards_BK, lengths_BK, mask_BK) -> loss_B`, with log-probabilities in nats
    summed over a response's tokens, and `mask_BK` False where a prompt has fewer than K responses. Its tensors are in
    float64, as in training. If the shape is wrong, nothing else is checked.

    >>> from align.losses.table import preference_loss
    >>> [result.name for result in check_loss(preference_loss("rpo_bwd_kl")) if result.status != "passed"]
    []
    >>> print(check_loss(lambda policy, reference, rewards, lengths, mask: (policy - reference).mean())[0])
    failed  shape          one value a prompt, in the dtype of its input: returned shape [], not [1]: ...
    """
    results: list[PropertyResult] = []
    properties = loss_properties(uses_rewards=bool(getattr(loss, "uses_rewards", True)))
    loss = _with_constants(loss)
    for each in properties:
        results.append(_checked(loss, each))
        if each.name == "shape" and results[-1].status == "failed":
            names = [*(one[:2] for one in properties[1:]), LEARNS, PREFERS_BEST]
            return results + [PropertyResult(*name, "skipped", "wrong shape") for name in names]
    return [*results, *_trained(loss)]


def assert_loss(loss: Callable[..., Tensor]) -> None:
    """Raise an `AssertionError` with one line for each property of `check_loss` that the loss does not have.

    For a test of your own loss::

        from align.losses.table import preference_loss
        from align.testing import assert_loss


        def test_my_loss():
            assert_loss(preference_loss("mine:make", beta=0.1))
    """
    failed = [str(result) for result in check_loss(loss) if result.status != "passed"]
    if failed:
        raise AssertionError("\n".join(failed))


def _with_constants(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss that also takes what the trainer computes without gradient, as constants."""
    if isinstance(loss, UnpairedLoss) and loss.uses_kl:
        return partial(loss, kl=REFERENCE_POINT)
    if isinstance(loss, PreferenceLoss) and loss.uses_weights:
        return partial(_weighted, loss)
    return loss


def _weighted(loss: PreferenceLoss, policy_BK: Tensor, *rest: Tensor) -> Tensor:
    return loss(policy_BK, *rest, log_weights_BK=torch.full_like(policy_BK, LOG_WEIGHT))


def _checked(loss: Callable[..., Tensor], each: Property) -> PropertyResult:
    for inputs in each.inputs:
        if _failure(each.check, loss, inputs) is not None:
            smallest = shrink(inputs, lambda smaller: _failure(each.check, loss, smaller) is not None)
            detail = f"{_failure(each.check, loss, smallest)}; {smallest}"
            return PropertyResult(each.name, each.promise, "failed", detail)
    return PropertyResult(each.name, each.promise, "passed")


def _failure(check: Check, loss: Callable[..., Tensor], inputs: LossInputs) -> str | None:
    """Return what is wrong on these inputs, an error of the loss included; None if nothing is."""
    try:
        return check(loss, inputs)
    except LOSS_ERRORS as error:
        return f"raised {_one_line(error)}"


def _trained(loss: Callable[..., Tensor]) -> list[PropertyResult]:
    """Train once and return the results of `LEARNS` and `PREFERS_BEST`."""
    try:
        before, after = train_tiny_policy(loss)
    except LOSS_ERRORS as error:
        return [PropertyResult(*name, "failed", f"raised {_one_line(error)}") for name in (LEARNS, PREFERS_BEST)]
    losses = f"{before.loss:.4f} before, {after.loss:.4f} after"
    gaps = f"a gap of {before.gap:.2f} nats before, {after.gap:.2f} after"
    return [
        PropertyResult(*LEARNS, _status(after.loss < before.loss - LEAST_CHANGE), losses),
        PropertyResult(*PREFERS_BEST, _status(after.gap > before.gap + LEAST_CHANGE), gaps),
    ]


def _status(holds: bool) -> Literal["passed", "failed"]:
    return "passed" if holds else "failed"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
