"""Properties that every preference loss must have. Each check returns None, or one sentence on what is wrong.

Shape legend: B prompts, K responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from align.testing.loss_inputs import LossInputs, extreme_inputs, masked_inputs, random_inputs

Loss: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]"
Check: TypeAlias = "Callable[[Loss, LossInputs], str | None]"

MANY_RESPONSES = 16
RTOL, ATOL = 1e-7, 1e-9  # between two orders of summation in fp64
STEP = 1e-6  # of finite differences, in nats; gradcheck's default
KINK_SHIFT = 1e-3  # nats; a kink of the loss at the input is not one at the input moved by this


class Property(NamedTuple):
    """One property: its name, what it promises, the check, and the inputs it is checked on."""

    name: str
    promise: str
    check: Check
    inputs: Sequence[LossInputs]


class Gradient(NamedTuple):
    """A loss and its gradient."""

    loss_B: Tensor
    policy_BK: Tensor  # derivative of the summed loss by the policy's log-probabilities


def loss_and_gradient(loss: Loss, inputs: LossInputs) -> Gradient:
    """Return the loss of each prompt, detached, and its gradient; 0 where autograd finds no dependence."""
    policy_BK = inputs.policy_BK.clone().requires_grad_()
    loss_B = loss(*inputs._replace(policy_BK=policy_BK))
    if not loss_B.requires_grad:
        return Gradient(loss_B, torch.zeros_like(policy_BK))
    (gradient_BK,) = torch.autograd.grad(loss_B.sum(), policy_BK, allow_unused=True, materialize_grads=True)
    return Gradient(loss_B.detach(), gradient_BK)


def check_shape(loss: Loss, inputs: LossInputs) -> str | None:
    """Check that the loss returns a tensor of shape [B] in the dtype of the log-probabilities."""
    loss_B = cast(object, loss(*inputs))
    if not isinstance(loss_B, Tensor):
        return f"returned a {type(loss_B).__name__}, not a tensor"
    expected = [len(inputs.policy_BK)]
    if list(loss_B.shape) != expected:
        return f"returned shape {list(loss_B.shape)}, not {expected}: one value a prompt"
    if loss_B.dtype != inputs.policy_BK.dtype:
        return f"returned {loss_B.dtype} for log-probabilities in {inputs.policy_BK.dtype}"
    return None


def check_finite(loss: Loss, inputs: LossInputs) -> str | None:
    """Check that loss and gradient are finite."""
    found = loss_and_gradient(loss, inputs)
    if not found.loss_B.isfinite().all():
        return f"the loss is {_shown(found.loss_B)}"
    if not found.policy_BK.isfinite().all():
        return f"the gradient is {_shown(found.policy_BK)}"
    return None


def check_gradient(loss: Loss, inputs: LossInputs) -> str | None:
    """Check the gradient with respect to the policy's log-probabilities against central differences in fp64.

    A loss may have kinks (hinge), so it fails only if it also fails at a point 0.001 nats away.
    """
    shifts_BK = KINK_SHIFT * torch.arange(1, inputs.policy_BK.numel() + 1).reshape(inputs.policy_BK.shape)
    shifted = inputs._replace(policy_BK=inputs.policy_BK + shifts_BK)
    if _passes_gradcheck(loss, inputs) or _passes_gradcheck(loss, shifted):
        return None
    autograd_BK = loss_and_gradient(loss, shifted).policy_BK
    differences_BK = _finite_differences(loss, shifted)
    return f"autograd gives the gradient {_shown(autograd_BK)}, finite differences {_shown(differences_BK)}"


def check_masked(loss: Loss, inputs: LossInputs) -> str | None:
    """Check that masked responses get no gradient, and that their values influence neither loss nor gradient."""
    found = loss_and_gradient(loss, inputs)
    masked_BK = ~inputs.mask_BK
    if found.policy_BK[masked_BK].any():
        return f"masked responses get the gradient {_shown(found.policy_BK[masked_BK])}, not 0"
    other = LossInputs(
        inputs.policy_BK.masked_fill(masked_BK, -1.0),
        inputs.reference_BK.masked_fill(masked_BK, -9.0),
        inputs.rewards_BK.masked_fill(masked_BK, 99.0),
        inputs.lengths_BK.masked_fill(masked_BK, 5.0),
        inputs.mask_BK,
    )
    return _difference("with other values in masked responses", found, loss_and_gradient(loss, other))


def check_padding(loss: Loss, inputs: LossInputs) -> str | None:
    """Check that appended masked responses, as the trainer pads a batch to its largest K, change nothing."""
    num_responses = inputs.mask_BK.shape[1]
    padded = loss_and_gradient(loss, inputs.padded(2))
    kept = Gradient(padded.loss_B, padded.policy_BK[:, :num_responses])
    return _difference("with two masked responses appended", loss_and_gradient(loss, inputs), kept)


def check_prompt_order(loss: Loss, inputs: LossInputs) -> str | None:
    """Check that a prompt has the same loss in another order of the prompts, and alone."""
    found = loss_and_gradient(loss, inputs)
    order = list(range(len(inputs.policy_BK)))[::-1]
    turned = loss_and_gradient(loss, inputs.prompts(order))
    restored = Gradient(turned.loss_B[order], turned.policy_BK[order])
    alone = [loss_and_gradient(loss, inputs.prompts([index])) for index in range(len(order))]
    joined = Gradient(torch.cat([each.loss_B for each in alone]), torch.cat([each.policy_BK for each in alone]))
    return _difference("with the prompts reversed", found, restored) or _difference(
        "with each prompt in a batch of its own", found, joined
    )


def check_response_order(loss: Loss, inputs: LossInputs) -> str | None:
    """Check that reordering the responses together with their rewards changes nothing."""
    found = loss_and_gradient(loss, inputs)
    columns = list(range(inputs.mask_BK.shape[1]))
    for order in (columns[::-1], [*columns[1:], columns[0]]):
        moved = loss_and_gradient(loss, inputs.responses(order))
        restored = Gradient(moved.loss_B, moved.policy_BK[:, [order.index(column) for column in columns]])
        if difference := _difference(f"with the responses in the order {order}", found, restored):
            return difference
    return None


def loss_properties(*, uses_rewards: bool) -> list[Property]:
    """Return the properties that need no training, in the order in which they are checked.

    A loss that reads only the order of the rewards never gets a prompt whose rewards are all equal.
    """
    plain = [random_inputs(num_prompts, size, seed=size) for num_prompts, size in ((1, 2), (3, 2), (3, 3), (4, 5))]
    masked = [masked_inputs(3, size, seed=size) for size in (3, 5)]
    extreme = [extreme_inputs(size, has_ties=uses_rewards) for size in (2, 3, MANY_RESPONSES)]
    return [
        Property("shape", "one value a prompt, in the dtype of its input", check_shape, [*plain, *masked]),
        Property("finite", "finite at large margins, many, empty and tied responses", check_finite, extreme),
        Property("gradient", "autograd agrees with finite differences in fp64", check_gradient, [*plain, *masked]),
        Property("masked", "masked responses have no gradient and no influence", check_masked, masked),
        Property("padding", "appended masked responses change nothing", check_padding, plain),
        Property("prompt_order", "a prompt's loss depends on that prompt only", check_prompt_order, [*plain, *masked]),
        Property("response_order", "the order of the responses changes nothing", check_response_order, plain),
    ]


def _passes_gradcheck(loss: Loss, inputs: LossInputs) -> bool:
    def losses(policy_BK: Tensor) -> Tensor:
        return loss(*inputs._replace(policy_BK=policy_BK))

    policy_BK = inputs.policy_BK.clone().requires_grad_()
    if not losses(policy_BK).requires_grad:
        return False  # gradcheck raises for such a function
    return torch.autograd.gradcheck(losses, (policy_BK,), eps=STEP, raise_exception=False)


def _finite_differences(loss: Loss, inputs: LossInputs) -> Tensor:
    """Return the central difference of the summed loss by each log-probability, shape [B, K]."""
    differences_BK = torch.zeros_like(inputs.policy_BK)
    for index in torch.ones_like(inputs.mask_BK).nonzero().unbind():
        step_BK = torch.zeros_like(inputs.policy_BK)
        step_BK[tuple(index)] = STEP
        above = loss(*inputs._replace(policy_BK=inputs.policy_BK + step_BK)).sum()
        below = loss(*inputs._replace(policy_BK=inputs.policy_BK - step_BK)).sum()
        differences_BK[tuple(index)] = (above - below) / (2 * STEP)
    return differences_BK.detach()


def _difference(change: str, before: Gradient, after: Gradient) -> str | None:
    """Return what differs, loss or gradient; None if neither does."""
    for name, old, new in zip(("loss", "gradient"), before, after, strict=True):
        if not torch.allclose(old, new, rtol=RTOL, atol=ATOL):
            return f"{change} the {name} is {_shown(new)}, not {_shown(old)}"
    return None


def _shown(tensor: Tensor) -> str:
    """Return a tensor of one or two dimensions as lists of numbers with four significant digits."""
    if tensor.ndim > 1:
        return f"[{', '.join(_shown(row) for row in tensor)}]"
    return f"[{', '.join(f'{value:.4g}' for value in tensor.tolist())}]"
