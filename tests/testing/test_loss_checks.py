"""The checks of a preference loss: every built-in loss passes, and each planted fault fails the property it breaks."""

import functools
import re

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.losses.table import LOSSES, preference_loss
from align.testing import assert_loss, check_loss
from align.testing.loss_inputs import masked_inputs, random_inputs, shrink

dpo = preference_loss("dpo")


def scalar(policy, reference, rewards, lengths, mask):
    return dpo(policy, reference, rewards, lengths, mask).mean()


def margins(policy, reference, rewards, mask):
    """Implicit reward by which the best response leads each other one, 0 for itself and masked ones."""
    implicit_BK = 0.1 * (policy - reference)
    best_B1 = rewards.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.where(mask, implicit_BK.gather(1, best_B1) - implicit_BK, 0)


def overflows(policy, reference, rewards, lengths, mask):
    margin_BK = margins(policy, reference, rewards, mask)
    return torch.where(mask, torch.log(1 + torch.exp(-margin_BK)), 0).sum(dim=1)


def detached(policy, reference, rewards, lengths, mask):
    loss_B = dpo(policy, reference, rewards, lengths, mask)
    return loss_B * (1 + loss_B.detach())


def leaks(policy, reference, rewards, lengths, mask):
    extra_B = torch.where(mask, 0, policy).sum(dim=1)
    return dpo(policy, reference, rewards, lengths, mask) + 0.1 * extra_B


def divides_by_k(policy, reference, rewards, lengths, mask):
    losses_BK = -logsigmoid(margins(policy, reference, rewards, mask))
    return torch.where(mask, losses_BK, 0).mean(dim=1)


def subtracts_the_batch_mean(policy, reference, rewards, lengths, mask):
    loss_B = dpo(policy, reference, rewards, lengths, mask)
    return loss_B + 0.1 * loss_B.mean()


def takes_the_first(policy, reference, rewards, lengths, mask):
    implicit_BK = 0.1 * (policy - reference).masked_fill(~mask, -1e9)
    return -implicit_BK.log_softmax(dim=1)[:, 0]


def ignores_the_policy(policy, reference, rewards, lengths, mask):
    return dpo(0 * policy, 0 * reference, rewards, lengths, mask)


def prefers_the_worst(policy, reference, rewards, lengths, mask):
    return dpo(policy, reference, -rewards, lengths, mask)


FAULTY = {
    scalar: {"shape"},
    overflows: {"finite"},
    detached: {"gradient"},
    leaks: {"masked"},
    divides_by_k: {"padding"},
    subtracts_the_batch_mean: {"prompt_order"},
    takes_the_first: {"response_order"},
    ignores_the_policy: {"learns", "prefers_best"},
    prefers_the_worst: {"prefers_best"},
}


checked = functools.cache(check_loss)


@pytest.mark.parametrize("name", LOSSES)
def test_every_built_in_loss_has_every_property(name):
    assert_loss(LOSSES[name])


@pytest.mark.parametrize("pairs", ["all", "best_worst"])
def test_a_loss_of_pairs_has_every_property(pairs):
    assert_loss(preference_loss("rpo_bwd_kl", pairs=pairs))


@pytest.mark.parametrize("loss", FAULTY, ids=lambda loss: loss.__name__)
def test_a_faulty_loss_fails_the_property_it_breaks_and_no_other(loss):
    results = checked(loss)
    assert {result.name for result in results if result.status == "failed"} == FAULTY[loss]
    skipped = {result.name for result in results if result.status == "skipped"}
    assert bool(skipped) == (loss is scalar)


def test_the_planted_faults_cover_every_property():
    assert set().union(*FAULTY.values()) == {result.name for result in checked(dpo)}


def detail(loss, name):
    return next(result.detail for result in checked(loss) if result.name == name)


def test_a_counterexample_is_as_small_as_the_fault_allows():
    # One prompt, two responses, no reference, one token each: what is left is the margin at which exp overflows
    found = re.fullmatch(
        r"the loss is \[inf\]; policy_logps=\[\[(\S+), (\S+)\]\] reference_logps=\[\[0, 0\]\] "
        r"rewards=\[\[(0, 1|1, 0)\]\] lengths=\[\[1, 1\]\]",
        detail(overflows, "finite"),
    )
    assert found
    assert 7097 < abs(float(found[1]) - float(found[2])) < 2 * 7099  # exp(709.78) is finite, and beta is 0.1
    assert "mask=[[True, True, False]]" in detail(leaks, "masked")
    assert "returned shape [], not [1]" in detail(scalar, "shape")
    assert "with the responses in the order [1, 0] the gradient is [[0.05, -0.05]], not" in detail(
        takes_the_first, "response_order"
    )


def test_what_a_loss_raises_is_a_failure_with_its_message():
    def pairs_only(policy, reference, rewards, lengths, mask):
        if policy.shape[1] != 2:
            raise ValueError("two responses, please")
        return dpo(policy, reference, rewards, lengths, mask)

    failed = {result.name: result.detail for result in check_loss(pairs_only) if result.status == "failed"}
    assert failed["shape"].startswith("raised ValueError: two responses, please; policy_logps=[[0, ")


def test_assert_loss_names_each_missing_property():
    with pytest.raises(AssertionError, match=r"^failed  prefers_best .*: a gap of .* nats before, -.* after$"):
        assert_loss(prefers_the_worst)


def test_shrinking_keeps_two_responses_a_prompt_and_ends():
    seen = []

    def fails(inputs):
        seen.append(inputs)
        return True

    smallest = shrink(masked_inputs(4, 5), fails)
    assert [list(tensor.shape) for tensor in smallest] == [[1, 2]] * 5
    assert all(int(inputs.mask_BK.sum(dim=1).min()) >= 2 for inputs in seen)
    assert smallest.policy_BK.tolist() == smallest.reference_BK.tolist() == [[0, 0]]
    assert sorted(smallest.rewards_BK[0].tolist()) == [0, 1]
    assert str(smallest).startswith("policy_logps=[[0, 0]] reference_logps=[[0, 0]] rewards=[[")


def test_shrinking_keeps_what_the_failure_needs():
    def fails(inputs):
        return bool((inputs.policy_BK < -10).any())

    smallest = shrink(random_inputs(3, 4), fails)
    assert smallest.policy_BK.shape == (1, 2)
    assert -21 <= float(smallest.policy_BK.min()) < -10
