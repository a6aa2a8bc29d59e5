"""Inputs of a preference loss: random ones, extreme ones, and the smallest ones for which a check still fails.

Shape legend: B prompts, K responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST_RESPONSES = 2  # groups with fewer are dropped before training


class LossInputs(NamedTuple):
    """The five arguments that the trainer passes to a preference loss, in this order."""

    policy_BK: Tensor  # fp64, summed log-probability of each response in nats
    reference_BK: Tensor  # fp64, the same of the reference policy
    rewards_BK: Tensor  # fp64
    lengths_BK: Tensor  # fp64, response tokens
    mask_BK: Tensor  # bool, False for a response that does not exist

    def prompts(self, indices: Sequence[int]) -> LossInputs:
        """Return the prompts at `indices`, in that order."""
        return LossInputs(*(tensor_BK[list(indices)] for tensor_BK in self))

    def responses(self, indices: Sequence[int]) -> LossInputs:
        """Return the responses (columns) at `indices`, in that order."""
        return LossInputs(*(tensor_BK[:, list(indices)] for tensor_BK in self))

    def padded(self, num_columns: int) -> LossInputs:
        """Return the inputs with masked responses appended; their values are 0, as in the trainer's batches."""
        return LossInputs(*(torch.nn.functional.pad(tensor_BK, (0, num_columns)) for tensor_BK in self))

    def __str__(self) -> str:
        """Return the values as Python lists; a mask without False is left out."""
        names = ("policy_logps", "reference_logps", "rewards", "lengths", "mask")
        shown = [f"{name}={_numbers(tensor_BK)}" for name, tensor_BK in zip(names, self, strict=True)]
        return " ".join(shown[:-1] if self.mask_BK.all() else shown)


def random_inputs(num_prompts: int, num_responses: int, *, seed: int = 0) -> LossInputs:
    """Return plausible inputs without ties or masked responses.

    Log-probabilities are about -3 nats a token over 1 to 8 tokens, log-ratios are normal with standard deviation 3, and
    the rewards of a prompt are 0, 0.5, 1, … in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_prompts, num_responses)
    lengths_BK = torch.randint(1, 9, shape, generator=generator).double()
    reference_BK = -3 * lengths_BK - torch.rand(shape, generator=generator, dtype=torch.float64)
    policy_BK = reference_BK + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    ranks_BK = torch.stack([torch.randperm(num_responses, generator=generator) for _ in range(num_prompts)])
    return LossInputs(policy_BK, reference_BK, ranks_BK.double() / 2, lengths_BK, torch.ones(shape, dtype=torch.bool))


def masked_inputs(num_prompts: int, num_responses: int, *, seed: int = 0) -> LossInputs:
    """Return random inputs with two responses to every other prompt, and `num_responses` to the rest."""
    inputs = random_inputs(num_prompts, num_responses, seed=seed)
    inputs.mask_BK[::2, FEWEST_RESPONSES:] = False
    return inputs


def extreme_inputs(num_responses: int, *, has_ties: bool) -> LossInputs:
    """Return log-ratios of ±10,000 nats, reward gaps of 10,000, responses of 0 and 1 token, and optionally ties.

    With `has_ties` all rewards of the last prompt are equal.
    """
    base = random_inputs(6, num_responses)
    ratios_BK = torch.zeros_like(base.policy_BK)
    ratios_BK[0, 0] = 1e4
    ratios_BK[1, -1] = 1e4
    ratios_BK[2] = -1e4
    ratios_BK[3, 0] = 1e4
    ratios_BK[3, 1:] = -1e4
    rewards_BK = base.rewards_BK.clone()
    rewards_BK[:2] *= 1e4
    lengths_BK = base.lengths_BK.clone()
    lengths_BK[2:4], lengths_BK[4] = 1, 0
    if has_ties:
        rewards_BK[-1] = 1
    reference_BK = torch.where(lengths_BK > 0, base.reference_BK, 0)
    return LossInputs(reference_BK + ratios_BK, reference_BK, rewards_BK, lengths_BK, base.mask_BK)


def shrink(inputs: LossInputs, fails: Callable[[LossInputs], bool]) -> LossInputs:
    """Return the smallest inputs found, by greedy reduction, for which `fails` is still true.

    The result has no prompt, response or value that one more reduction could remove or simplify.
    """
    while (smaller := next((each for each in _reductions(inputs) if fails(each)), None)) is not None:
        inputs = smaller
    return inputs


def _reductions(inputs: LossInputs) -> Iterator[LossInputs]:
    """Yield the inputs with one prompt or response less, then with simpler values."""
    num_prompts, num_responses = inputs.mask_BK.shape
    if num_prompts > 1:
        for index in range(num_prompts):
            yield inputs.prompts([each for each in range(num_prompts) if each != index])
    for index in range(num_responses):
        fewer = inputs.responses([each for each in range(num_responses) if each != index])
        if int(fewer.mask_BK.sum(dim=1).min()) >= FEWEST_RESPONSES:
            yield fewer
    for simpler in _simpler_values(inputs):
        if not all(torch.equal(old, new) for old, new in zip(inputs, simpler, strict=True)):
            yield simpler


def _simpler_values(inputs: LossInputs) -> Iterator[LossInputs]:
    """Yield the inputs with one argument simplified; some may be equal to `inputs`."""
    yield inputs._replace(mask_BK=torch.ones_like(inputs.mask_BK))
    zero_BK = torch.zeros_like(inputs.reference_BK)
    yield inputs._replace(policy_BK=inputs.policy_BK - inputs.reference_BK, reference_BK=zero_BK)
    yield inputs._replace(lengths_BK=torch.ones_like(inputs.lengths_BK))
    yield inputs._replace(rewards_BK=_dense_ranks(inputs.rewards_BK))
    yield inputs._replace(policy_BK=inputs.policy_BK.trunc())
    yield inputs._replace(policy_BK=(inputs.policy_BK / 2).trunc())


def _dense_ranks(rewards_BK: Tensor) -> Tensor:
    """Return 0, 1, 2, … in place of the rewards of each prompt; equal rewards stay equal."""
    return torch.stack([rewards_K.unique(return_inverse=True)[1] for rewards_K in rewards_BK]).to(rewards_BK.dtype)


def _numbers(tensor_BK: Tensor) -> str:
    """Return a tensor as nested lists of numbers with up to six significant digits, -0 as 0."""
    if tensor_BK.dtype == torch.bool:
        return str(tensor_BK.tolist())
    rows = [", ".join(f"{value + 0.0:.6g}" for value in row) for row in tensor_BK.tolist()]
    return f"[{', '.join(f'[{row}]' for row in rows)}]"
