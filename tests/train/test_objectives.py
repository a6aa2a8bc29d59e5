import math

import numpy as np
import pytest
import torch
from tiny_training import VOCABULARY, comparisons, group, policy, preference, supervised

from align.data.token_groups import TokenGroup, TokenSequence
from align.errors import InputError
from align.losses.preference import PreferenceLoss
from align.losses.table import LOSSES
from align.models.tree.batch import plain_batch, tree_batch
from align.train.indexed_groups import GroupView
from align.train.objectives.batch import group_batch
from align.train.objectives.preference import PreferenceObjective
from align.train.objectives.settings import PreferenceSettings


def tenths(tokens):
    """A policy that says -0.1 for token 1, -0.2 for token 2 ..., whatever stands before it."""
    return -tokens.targets_N.float() / 10


def said(objective, groups, references=None):
    """Loss and mean tallies of the groups as one micro-batch, references given by the response."""
    step = objective(tenths, group_batch(groups, references, tree_batch))
    return step.loss.item(), {name: (tally.total / tally.count).item() for name, tally in step.tallies.items()}


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


# Responses of 5 and 4 tenths of a nat; the references leave log-ratios of -0.2 and 0.1.
PAIR = group([1], [[2, 3], [4]], rewards=[1.0, 0.25])
REFERENCES = [[-0.3, -0.5]]


def test_dpo_and_its_tallies_are_those_worked_out_by_hand():
    loss, tallies = said(preference("dpo", beta=0.5), [PAIR], REFERENCES)
    assert loss == pytest.approx(-math.log(sigmoid(0.5 * (-0.2 - 0.1))))
    assert tallies == pytest.approx(
        {
            "loss/preference": loss,
            "loss/sft": 0.5,
            "rewards/chosen": -0.1,
            "rewards/rejected": 0.05,
            "rewards/margins": -0.15,
            "rewards/accuracies": 0.0,
            "logps/chosen": -0.5,
            "logps/rejected": -0.4,
        }
    )


def test_rpo_is_the_divergence_between_two_coins_for_a_pair():
    loss, tallies = said(preference("rpo_bwd_kl", beta=0.5, eta=2.0), [PAIR], REFERENCES)
    assert loss == pytest.approx(bernoulli_kl(sigmoid(2.0 * 0.75), sigmoid(0.5 * -0.3)))
    assert tallies["rewards/margins"] == pytest.approx(-0.15)


# With the label on the second response, which the rewards think less of or as much of
@pytest.mark.parametrize("rewards", [(1.0, 0.25), (0.25, 0.25), (1.0, 1.0), None])
def test_dpo_follows_the_label_against_or_without_the_rewards(rewards):
    labelled = group([1], [[2, 3], [4]], rewards=rewards, chosen=1)
    loss, tallies = said(preference("dpo", beta=0.5), [labelled], REFERENCES)
    assert loss == pytest.approx(-math.log(sigmoid(0.5 * (0.1 + 0.2))))
    assert tallies["logps/chosen"] == pytest.approx(-0.4)
    assert tallies["rewards/accuracies"] == 1.0


@pytest.mark.parametrize(("rewards", "best"), [((1.0, 0.25), -0.5), ((0.25, 0.25), -0.5), ((-3.0, -1.0), -0.4)])
def test_rpo_follows_the_rewards_against_the_label(rewards, best):
    labelled = group([1], [[2, 3], [4]], rewards=rewards, chosen=1)
    loss, tallies = said(preference("rpo_bwd_kl", beta=0.5), [labelled], REFERENCES)
    assert loss == pytest.approx(bernoulli_kl(sigmoid(rewards[0] - rewards[1]), sigmoid(0.5 * -0.3)))
    assert tallies["loss/sft"] == pytest.approx(-best)


def test_metrics_of_pairs_leave_out_groups_that_tie_and_take_the_pair_that_the_loss_compares():
    tied = group([1], [[2], [4]], rewards=[1.0, 1.0])
    # Nats 0.5, 0.4 and 0.6 with log-ratios of -0.2, 0.1 and -0.3; the last two are equally bad
    ranked = group([1], [[2, 3], [4], [6]], rewards=[1.0, 0.0, 0.0])
    loss, tallies = said(
        preference("dpo", beta=1.0, pairs="best_worst"), [tied, ranked], [[0.0, 0.0], [-0.3, -0.5, -0.3]]
    )
    assert loss == pytest.approx(-math.log(sigmoid(-0.2 + 0.3)))
    assert tallies["loss/preference"] == pytest.approx(loss / 2)
    assert (tallies["rewards/chosen"], tallies["rewards/rejected"]) == pytest.approx((-0.2, -0.3))
    assert (tallies["logps/chosen"], tallies["logps/rejected"]) == pytest.approx((-0.5, -0.6))
    assert (tallies["rewards/margins"], tallies["rewards/accuracies"]) == pytest.approx((0.1, 1.0))


@pytest.mark.parametrize("rewards", [(0.5, 0.5, 0.5), None])
def test_groups_that_tie_without_a_label_cost_nothing_under_dpo_and_move_nothing(rewards):
    tied = group([1], [[2, 3], [4], [5, 5]], rewards=rewards)
    theta_V = torch.zeros(VOCABULARY, requires_grad=True)
    step = preference("dpo")(lambda tokens: theta_V[tokens.targets_N], group_batch([tied], [[0.0, 1, 2]], tree_batch))
    assert step.loss.item() == 0
    step.loss.backward()
    assert not theta_V.grad.any()


def test_a_label_wins_over_higher_rewards_among_many():
    # Plackett-Luce top choice of the third, whose reward is the lowest; implicit rewards -0.5, -0.4 and -0.6
    many = group([1], [[2, 3], [4], [6]], rewards=[3.0, 2.0, 1.0], chosen=2)
    loss, tallies = said(preference("dpo", beta=1.0), [many], [[0.0, 0.0, 0.0]])
    shares = [math.exp(value) for value in (-0.5, -0.4, -0.6)]
    assert loss == pytest.approx(-math.log(shares[2] / sum(shares)))
    assert tallies["logps/chosen"] == pytest.approx(-0.6)
    assert tallies["logps/rejected"] == pytest.approx(-0.4)  # the second is the worst of the others


# (loss, rewards, label, which response is supervised)
BEST = [
    ("dpo", (0.0, 2.0, 2.0), None, 1),
    ("dpo", (0.0, 2.0, 2.0), 0, 0),
    ("dpo", (0.0, 2.0, 2.0), 2, 2),
    ("rpo_bwd_kl", (0.0, 2.0, 2.0), None, 1),
    ("rpo_bwd_kl", (0.0, 2.0, 2.0), 0, 1),
    ("rpo_sq", (-5.0, -2.0, -2.5), 0, 1),
    ("rpo_fwd_kl", (1.0, 1.0, 1.0), 2, 0),
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("name", "rewards", "chosen", "best"), BEST)
def test_the_supervised_term_is_on_the_best_response_the_first_of_equals(name, rewards, chosen, best, per_token):
    many = group([1], [[2, 3], [4, 4, 4], [6]], rewards=rewards, chosen=chosen)
    nll = [0.5, 1.2, 0.6][best] / ([2, 3, 1][best] if per_token else 1)
    alone, _ = said(preference(name), [many], [[0.0, 0.1, 0.2]])
    loss, tallies = said(preference(name, sft_weight=0.7, sft_per_token=per_token), [many], [[0.0, 0.1, 0.2]])
    assert tallies["loss/sft"] == pytest.approx(nll)
    assert tallies["loss/preference"] == pytest.approx(alone)
    assert loss == pytest.approx(alone + 0.7 * nll)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_losses_whose_papers_have_a_supervised_term_have_it_by_default(name):
    settings = PreferenceSettings.model_validate({"name": name})
    assert (settings.sft_weight, settings.sft_per_token) == (1.0, True)
    without = PreferenceSettings.model_validate({"name": name, "sft_weight": 0.0})
    assert without.sft_weight == 0
    assert PreferenceSettings.model_validate({"name": "dpo"}).sft_weight == 0
    many = group([1], [[2, 3], [4, 4, 4]], rewards=(1.0, 0.0))
    (loss, tallies), (alone, _) = (
        said(PreferenceObjective(each), [many], [[0.0, 0.0]]) for each in (settings, without)
    )
    assert tallies["loss/sft"] == pytest.approx(0.5 / 2)  # nats of the better response over its tokens
    assert loss == pytest.approx(alone + 0.5 / 2)


@pytest.mark.parametrize("make", [tree_batch, plain_batch])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_group_costs_the_same_beside_others_of_other_sizes(name, make):
    groups = [*comparisons(4, sizes=(2, 3, 5), seed=1), *comparisons(2, sizes=(1,)), *comparisons(2, sizes=(4,))]
    objective = preference(name, sft_weight=0.1 if isinstance(LOSSES[name], PreferenceLoss) else 0.0)
    references = [[-float(len(each.ids)) for each in one.sequences] for one in groups]

    def run(chosen):
        theta_V = torch.linspace(-3, 0, VOCABULARY, requires_grad=True)
        batch = group_batch([groups[index] for index in chosen], [references[index] for index in chosen], make)
        step = objective(lambda tokens: theta_V[tokens.targets_N], batch)
        step.loss.backward()
        tallies = {name: torch.stack([tally.total, tally.count]) for name, tally in step.tallies.items()}
        return step.loss.item(), theta_V.grad, tallies

    loss, gradient, tallies = run(range(len(groups)))
    losses, gradients, parts = zip(*(run([index]) for index in range(len(groups))), strict=True)
    assert loss == pytest.approx(sum(losses), rel=1e-6)
    torch.testing.assert_close(gradient, sum(gradients), rtol=1e-5, atol=1e-5)
    for name in tallies:
        torch.testing.assert_close(tallies[name], sum(part[name] for part in parts), rtol=1e-6, atol=1e-6)


def test_the_supervised_loss_is_a_sum_over_tokens_for_the_step_to_divide():
    rows = [group([9], [[1, 2]]), group([9, 9, 9], [[3]]), group([9], [[1, 1, 1, 1, 1]])]
    loss, tallies = said(supervised(), rows)
    assert loss == pytest.approx(0.3 + 0.3 + 0.5)
    assert supervised().denominator(GroupView(rows)) == 8
    assert tallies["nll"] == pytest.approx(1.1 / 8)


def test_only_trained_tokens_are_supervised():
    ids, trained = np.arange(8, dtype=np.int32), np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=np.bool_)
    two_turns = TokenGroup((TokenSequence(ids, trained),), None, None, ({},), 0)
    loss, _ = said(supervised(), [two_turns])
    assert loss == pytest.approx(0.2 + 0.3 + 0.6)


# What each loss is before any update, from the rewards of a pair (gap g) by the table of NeMo-Aligner's losses
FIRST = {
    "dpo": lambda gap: math.log(2),
    "rpo_bwd_kl": lambda gap: bernoulli_kl(sigmoid(gap), 0.5),
    "rpo_fwd_kl": lambda gap: bernoulli_kl(0.5, sigmoid(gap)),
    "rpo_sq": lambda gap: gap**2,
    "ipo": lambda gap: 25.0,  # 1 / (4 beta²) at a beta of 0.1
    "hinge": lambda gap: 1.0,
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_loss_is_known_before_any_update(name):
    pairs = [group([1], [[2], [3]], rewards=rewards) for rewards in ((1.0, 0.0), (-1.0, 2.0), (0.5, 0.25))]
    loss, tallies = said(preference(name), pairs, [[-0.2, -0.3]] * 3)  # the reference says what the policy says
    assert loss == pytest.approx(sum(FIRST[name](gap) for gap in (1.0, 3.0, 0.25)))
    assert tallies["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_loss_without_a_reference_asks_for_none():
    assert not preference("simpo").needs_reference
    assert not supervised().needs_reference
    assert preference("dpo").needs_reference


def test_a_step_shows_what_the_policy_says_of_every_response():
    batch = group_batch([PAIR, group([1], [[6]], rewards=[0.0])], None, tree_batch)
    torch.testing.assert_close(
        preference("dpo")(tenths, batch).logps_BK, torch.tensor([[-0.5, -0.4], [-0.6, 0.0]], dtype=torch.float64)
    )


def test_wpo_weighs_a_pair_by_what_the_policy_would_sample():
    pairs = [group([1, 2], [[2, 3], [4]], rewards=[1.0, 0.0]), group([3], [[5], [6, 7, 7]], rewards=[0.0, 1.0])]
    references = [[-9.0, -5.0], [-4.0, -12.0]]
    model = policy().eval()
    model.use_forward("tree")
    batch = group_batch(pairs, references, tree_batch)
    plain, weighted = (preference("dpo", **settings)(model, batch) for settings in ({}, {"weighting": "wpo"}))
    model.use_forward("plain")
    costs, weights = [], []
    for index, pair in enumerate(pairs):
        alone = preference("dpo")(model, group_batch([pair], [references[index]], plain_batch)).loss.item()
        log_weight = 0.0
        for one in pair.sequences:
            p_TV = model.hf(torch.from_numpy(one.ids.astype("int64"))[None]).logits[0].double().softmax(dim=-1)
            tokens = [(at - 1, one.ids[at]) for at in np.flatnonzero(one.loss_mask)]
            log_weight += np.mean([(p_TV[at, token] / p_TV[at].square().sum()).log().item() for at, token in tokens])
        weights.append(min(1.0, math.exp(log_weight)))
        costs.append(weights[-1] * alone)
    assert weighted.loss.item() == pytest.approx(sum(costs), rel=1e-5)
    assert weighted.tallies["weights"].total.item() == pytest.approx(sum(weights), rel=1e-5)
    assert "weights" not in plain.tallies and min(weights) < 0.9
    torch.testing.assert_close(weighted.logps_BK, plain.logps_BK)


def shifted(shift=0.0):
    """A user's own loss: what it was given, so that a test can look at it."""

    def loss(policy_BK, reference_BK, rewards_BK, lengths_BK, mask_BK):
        parts = (policy_BK - reference_BK) + 10 * rewards_BK + 100 * lengths_BK
        return (parts * mask_BK).sum(dim=-1) + shift

    return loss


def averaged():
    return lambda policy_BK, *rest: policy_BK.mean()


def as_number():
    return lambda policy_BK, *rest: policy_BK.mean().item()


def forgotten():
    return lambda *tensors: None


def test_a_users_own_loss_comes_in_by_its_name():
    groups = [PAIR, group([1], [[5]], rewards=[3.0])]
    objective = preference(f"{__name__}:shifted", shift=0.5)
    loss, tallies = said(objective, groups, [REFERENCES[0], [-0.5]])
    assert loss == pytest.approx((-0.2 + 0.1) + 10 * 1.25 + 100 * 3 + 0.5 + 10 * 3.0 + 100 + 0.5)
    assert tallies["rewards/chosen"] == pytest.approx(-0.2)  # the plain log-ratio: nothing is known of its beta


def test_a_users_own_loss_that_is_not_one_value_a_group_is_refused():
    with pytest.raises(InputError, match=r"'test_objectives:averaged' returned shape \[\] for 1 groups"):
        said(preference("test_objectives:averaged"), [PAIR], REFERENCES)
    for name, kind in (("as_number", "float"), ("forgotten", "NoneType")):
        with pytest.raises(
            InputError, match=f"'test_objectives:{name}' returned {kind} for 1 groups; it must return a"
        ):
            said(preference(f"test_objectives:{name}"), [PAIR], REFERENCES)


def test_two_objectives_are_one_only_with_all_the_same_settings():
    made = [
        supervised(),
        preference("dpo"),
        preference("ipo"),
        preference("dpo", beta=0.2),
        preference("dpo", sft_weight=0.1),
        preference("dpo", sft_weight=0.1, sft_per_token=True),
        preference("rpo_bwd_kl"),
    ]
    assert len({str(each.cache_key()) for each in made}) == len(made)
    assert preference("dpo", beta=0.2).cache_key() == made[3].cache_key()
