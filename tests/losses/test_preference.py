"""Preference losses against pure-Python arithmetic, their symmetries and their limits."""

import math
from itertools import combinations

import pytest
import torch

from align.errors import InputError
from align.losses.comparisons import PAIRS
from align.losses.preference import PreferenceLoss
from align.losses.table import LOSSES as ALL_LOSSES
from align.losses.table import CustomLoss, preference_loss
from align.losses.unpaired import UnpairedLoss

LOSSES = {name: loss for name, loss in ALL_LOSSES.items() if not isinstance(loss, UnpairedLoss)}
NAN, INF = math.nan, math.inf


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def categorical_kl(p_K, q_K):
    return sum(p * math.log(p / q) for p, q in zip(p_K, q_K, strict=True))


def shares(values_K):
    weights_K = [math.exp(value) for value in values_K]
    return [weight / sum(weights_K) for weight in weights_K]


def log_odds(mean_logp):
    """Return log(p / (1 - p)) of a probability given by its logarithm."""
    return mean_logp - math.log(-math.expm1(mean_logp))


# Loss of two responses, from a = margin in implicit reward and b = margin in target reward
PAIRWISE = {
    "dpo": lambda a, b: softplus(-a),
    "dpo_norm": lambda a, b: softplus(-a),
    "cdpo": lambda a, b: 0.9 * softplus(-a) + 0.1 * softplus(a),
    "robust": lambda a, b: (0.9 * softplus(-a) - 0.1 * softplus(a)) / 0.8,
    "ipo": lambda a, b: (a / 0.1 - 5) ** 2,
    "ipo_norm": lambda a, b: (a / 0.1 - 5) ** 2,
    "exo": lambda a, b: bernoulli_kl(sigmoid(a), 0.999),
    "hinge": lambda a, b: max(0, 1 - a),
    "simpo": lambda a, b: math.log(1 + math.exp(1 - a)),
    "cpo": lambda a, b: softplus(-a),
    "rpo_bwd_kl": lambda a, b: bernoulli_kl(sigmoid(b), sigmoid(a)),
    "rpo_fwd_kl": lambda a, b: bernoulli_kl(sigmoid(a), sigmoid(b)),
    "rpo_sq": lambda a, b: (a - b) ** 2,
}

# Loss of two responses that depends on more than their margin, from the implicit rewards of the better and the worse
POINTWISE = {
    "apo_zero": lambda better, worse: 1 - sigmoid(better) + sigmoid(worse),
    "apo_down": lambda better, worse: sigmoid(better) + 1 - sigmoid(better - worse),
    "orpo": lambda better, worse: 0.1 * softplus(log_odds(worse / 0.1) - log_odds(better / 0.1)),
}

# Loss of any number of responses, from their implicit and target rewards
LISTWISE = {
    "dpo": lambda a_K, b_K: -math.log(shares(a_K)[b_K.index(max(b_K))]),
    "dpo_norm": lambda a_K, b_K: -math.log(shares(a_K)[b_K.index(max(b_K))]),
    "rpo_bwd_kl": lambda a_K, b_K: categorical_kl(shares(b_K), shares(a_K)),
    "rpo_fwd_kl": lambda a_K, b_K: categorical_kl(shares(a_K), shares(b_K)),
    "rpo_sq": lambda a_K, b_K: mean(
        ((a_K[i] - a_K[j]) - (b_K[i] - b_K[j])) ** 2 for i, j in combinations(range(len(a_K)), 2)
    ),
}

EVERY_FORM = [(name, pairs) for name in LOSSES for pairs in PAIRS if pairs != "none" or name in LISTWISE]
NAMES_LISTWISE = sorted(LISTWISE)
LABEL = [name for name in LOSSES if not name.startswith("rpo_")]
PER_TOKEN = ("dpo_norm", "ipo_norm", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "cpo", "orpo")
BETA = {"dpo_norm": 5.0, "simpo": 2.0, "rpo_bwd_kl": 0.2, "rpo_fwd_kl": 0.2, "rpo_sq": 0.2}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def python_loss(name, pairs, group):
    """Compute the loss of one group of Python numbers by enumeration."""
    a_K = []
    for policy, reference, length in zip(group["policy"], group["reference"], group["length"], strict=True):
        gain = policy if name in REFERENCE_FREE else policy - reference
        a_K.append(BETA.get(name, 0.1) * (gain / length if name in PER_TOKEN else gain))
    b_K = group["reward"]
    if pairs == "none":
        return LISTWISE[name](a_K, b_K)
    ranked = sorted(range(len(b_K)), key=lambda k: -b_K[k])
    chosen = list(combinations(ranked, 2)) if pairs == "all" else [(ranked[0], ranked[-1])]
    counted = [(i, j) for i, j in chosen if name not in LABEL or b_K[i] > b_K[j]]
    if name in POINTWISE:
        scored = [POINTWISE[name](a_K[i], a_K[j]) for i, j in counted]
    else:
        scored = [PAIRWISE[name](a_K[i] - a_K[j], b_K[i] - b_K[j]) for i, j in counted]
    return mean(scored) if scored else 0.0


def random_groups(num_groups, num_responses, *, seed=0, dtype=torch.float64):
    """Return log-probabilities, rewards without ties, and lengths of random groups."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_responses)
    lengths_BK = torch.randint(1, 9, shape, generator=generator)
    reference_BK = -12 - 3 * lengths_BK - 4 * torch.rand(shape, generator=generator, dtype=dtype)
    policy_BK = reference_BK + 3 * torch.randn(shape, generator=generator, dtype=dtype)
    rewards_BK = torch.stack([torch.randperm(num_responses, generator=generator) for _ in range(num_groups)]) / 2.0
    return policy_BK.to(dtype), reference_BK.to(dtype), rewards_BK.to(dtype), lengths_BK


def as_python(groups):
    names = ("policy", "reference", "reward", "length")
    return [
        dict(zip(names, row, strict=True)) for row in zip(*(tensor_BK.tolist() for tensor_BK in groups), strict=True)
    ]


def value_and_gradient(loss, groups, mask_BK=None):
    policy_BK = groups[0].clone().requires_grad_()
    loss_B = loss(policy_BK, *groups[1:], mask_BK)
    return loss_B.detach(), torch.autograd.grad(loss_B.sum(), policy_BK)[0]


def test_every_loss_has_a_closed_form_in_this_file():
    assert {*PAIRWISE, *POINTWISE} == set(LOSSES)
    assert {name for name in LOSSES if LOSSES[name].pairs == "none"} == set(LISTWISE)


@pytest.mark.parametrize("num_responses", [2, 3, 5])
@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_losses_equal_an_enumeration_in_python(name, pairs, num_responses):
    groups = random_groups(7, num_responses)
    expected_B = [python_loss(name, pairs, group) for group in as_python(groups)]
    loss_B = preference_loss(name, pairs=pairs)(*groups)
    torch.testing.assert_close(loss_B, torch.tensor(expected_B, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_ties_count_for_reward_losses_only(name, pairs):
    policy_BK, reference_BK, _, lengths_BK = random_groups(3, 4)
    rewards_BK = torch.tensor([[2.0, 1, 2, 1], [0, 1, 1, 1], [0, 0, 1, 2]], dtype=torch.float64)
    groups = (policy_BK, reference_BK, rewards_BK, lengths_BK)
    expected_B = [python_loss(name, pairs, group) for group in as_python(groups)]
    torch.testing.assert_close(preference_loss(name, pairs=pairs)(*groups).tolist(), expected_B)


@pytest.mark.parametrize("num_responses", [2, 4])
@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_gradients_equal_finite_differences(name, pairs, num_responses):
    policy_BK, *rest = random_groups(3, num_responses, seed=1)
    mask_BK = torch.ones_like(policy_BK, dtype=torch.bool)
    mask_BK[0, -1] = False
    loss = preference_loss(name, pairs=pairs)
    assert torch.autograd.gradcheck(lambda policy: loss(policy, *rest, mask_BK), policy_BK.requires_grad_())


@pytest.mark.parametrize("num_responses", [2, 3, 5])
@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_the_order_of_the_responses_does_not_matter(name, pairs, num_responses):
    groups = random_groups(5, num_responses)
    order_K = torch.randperm(num_responses, generator=torch.Generator().manual_seed(3)).roll(1)
    loss = preference_loss(name, pairs=pairs)
    loss_B, gradient_BK = value_and_gradient(loss, groups)
    shuffled_B, shuffled_gradient_BK = value_and_gradient(loss, [tensor_BK[:, order_K] for tensor_BK in groups])
    torch.testing.assert_close(shuffled_B, loss_B)
    torch.testing.assert_close(shuffled_gradient_BK, gradient_BK[:, order_K])


@pytest.mark.parametrize("num_responses", [2, 3, 5])
@pytest.mark.parametrize(("name", "pairs"), [form for form in EVERY_FORM if form[0] not in POINTWISE])
def test_only_differences_within_a_group_matter(name, pairs, num_responses):
    policy_BK, reference_BK, rewards_BK, lengths_BK = random_groups(5, num_responses)
    offset_B1 = torch.linspace(-7, 9, 5, dtype=torch.float64)[:, None]
    loss = preference_loss(name, pairs=pairs)
    loss_B = loss(policy_BK, reference_BK, rewards_BK, lengths_BK)
    shift_BK = offset_B1 * lengths_BK if loss.per_token else offset_B1
    torch.testing.assert_close(loss(policy_BK, reference_BK, rewards_BK + offset_B1, lengths_BK), loss_B)
    torch.testing.assert_close(loss(policy_BK + shift_BK, reference_BK, rewards_BK, lengths_BK), loss_B)


def logit(share):
    return math.log(share / (1 - share))


# A loss at a limit of its settings, and the loss that it equals there
LIMITS = {
    "rpo_bwd_kl with infinite eta is dpo": (("rpo_bwd_kl", {"eta": 1e6, "beta": 0.1}), ("dpo", {})),
    "cdpo without smoothing is dpo": (("cdpo", {"label_smoothing": 0}), ("dpo", {"pairs": "all"})),
    "robust without smoothing is dpo": (("robust", {"label_smoothing": 0}), ("dpo", {"pairs": "all"})),
    "dpo_norm not per token is dpo": (("dpo_norm", {"per_token": False, "beta": 0.1}), ("dpo", {})),
    "simpo without margin is dpo_norm without reference": (
        ("simpo", {"gamma": 0.0}),
        ("dpo_norm", {"pairs": "all", "reference_free": True, "beta": 2.0}),
    ),
    "ipo_norm is ipo per token": (("ipo_norm", {}), ("ipo", {"per_token": True})),
    "cpo is dpo without reference": (("cpo", {}), ("dpo", {"reference_free": True, "pairs": "all"})),
    "rpo_sq of all pairs is rpo_sq of the group": (("rpo_sq", {"pairs": "all"}), ("rpo_sq", {})),
}


@pytest.mark.parametrize("num_responses", [2, 3, 5])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_losses_are_other_losses(limit, num_responses):
    (name, settings), (other, other_settings) = LIMITS[limit]
    groups = random_groups(5, num_responses)
    found = value_and_gradient(preference_loss(name, **settings), groups)
    torch.testing.assert_close(found, value_and_gradient(preference_loss(other, **other_settings), groups))


def test_cdpo_is_backward_kl_to_the_smoothed_label_plus_its_entropy():
    policy_BK, reference_BK, label_BK, lengths_BK = random_groups(5, 2)
    target_BK = label_BK * 2 * logit(0.7)  # a reward gap whose sigmoid is 0.7
    backward_B, backward_gradient_BK = value_and_gradient(
        preference_loss("rpo_bwd_kl", beta=0.1), (policy_BK, reference_BK, target_BK, lengths_BK)
    )
    smoothed_B, smoothed_gradient_BK = value_and_gradient(
        preference_loss("cdpo", label_smoothing=0.3), (policy_BK, reference_BK, label_BK, lengths_BK)
    )
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    torch.testing.assert_close(smoothed_B, backward_B + entropy)
    torch.testing.assert_close(smoothed_gradient_BK, backward_gradient_BK)


def test_exo_is_the_forward_kl_to_rewards_whose_gap_has_the_smoothed_share():
    policy_BK, reference_BK, label_BK, lengths_BK = random_groups(5, 2)
    target_BK = label_BK * 2 * logit(0.7)
    forward = value_and_gradient(
        preference_loss("rpo_fwd_kl", beta=0.1), (policy_BK, reference_BK, target_BK, lengths_BK)
    )
    groups = (policy_BK, reference_BK, label_BK, lengths_BK)
    torch.testing.assert_close(value_and_gradient(preference_loss("exo", label_smoothing=0.3), groups), forward)


def test_apo_zero_raises_the_better_response_and_apo_down_lowers_both():
    _, zero_BK = value_and_gradient(preference_loss("apo_zero"), random_groups(9, 2))
    rewards_BK = random_groups(9, 2)[2]
    assert ((zero_BK < 0) == (rewards_BK > 0)).all()  # descent raises exactly the better responses
    equal = [torch.zeros(1, 2, dtype=torch.float64) for _ in range(2)]
    groups = (*equal, torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.ones(1, 2))
    _, down_BK = value_and_gradient(preference_loss("apo_down", beta=1.0), groups)
    assert down_BK.tolist() == [[pytest.approx(0.25 - 0.25), pytest.approx(0.25)]]  # slopes of sigmoids at 0
    groups[0][0] = torch.tensor([3.0, -2.0])  # already ranked: both are lowered
    _, down_BK = value_and_gradient(preference_loss("apo_down", beta=1.0), groups)
    assert (down_BK > 0).all()


@pytest.mark.parametrize("probability", [1e-30, 0.3, 0.5, 0.7, 1 - 1e-9])
def test_orpo_compares_the_odds_of_the_mean_token_probabilities(probability):
    lengths_BK = torch.tensor([[4, 9]])
    probabilities = torch.tensor([[probability, 0.4]], dtype=torch.float64)
    policy_BK = probabilities.log() * lengths_BK
    loss = preference_loss("orpo", beta=0.5)
    found_B = loss(policy_BK, policy_BK * 0, torch.tensor([[1.0, 0.0]]), lengths_BK)
    ratio = (probability / (1 - probability)) / (0.4 / 0.6)
    assert found_B.item() == pytest.approx(0.5 * math.log(1 + 1 / ratio), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"orpo"}))
def test_a_length_penalty_is_the_loss_of_log_ratios_that_are_that_much_larger_per_token(name):
    policy_BK, reference_BK, rewards_BK, lengths_BK = random_groups(5, 3)
    loss = preference_loss(name, length_penalty=0.01)
    per_unit_BK = lengths_BK if loss.per_token else 1
    shifted_BK = policy_BK + 0.01 * lengths_BK / loss.beta * per_unit_BK
    if name == "orpo":  # has no odds for probabilities above 1
        shifted_BK, policy_BK = shifted_BK - 9, policy_BK - 9
    plain_B = LOSSES[name](shifted_BK, reference_BK, rewards_BK, lengths_BK)
    torch.testing.assert_close(loss(policy_BK, reference_BK, rewards_BK, lengths_BK), plain_B)


def test_a_length_penalty_asks_less_of_a_longer_winner():
    zero_BK, rewards_BK = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    loss = preference_loss("dpo", length_penalty=0.1)
    longer_B, shorter_B = (
        loss(zero_BK, zero_BK, rewards_BK, torch.tensor([lengths])) for lengths in ([20, 10], [10, 20])
    )
    assert longer_B.item() == pytest.approx(softplus(-0.1 * 10))
    assert shorter_B.item() == pytest.approx(softplus(0.1 * 10))


@pytest.mark.parametrize("num_responses", [2, 4])
@pytest.mark.parametrize(("name", "pairs"), [form for form in EVERY_FORM if form[0] in LABEL and form[1] != "none"])
def test_weights_multiply_each_pair_by_the_product_of_its_responses_capped_at_one(name, pairs, num_responses):
    groups = random_groups(5, num_responses)
    log_weights_BK = torch.linspace(-2, 1, 5 * num_responses, dtype=torch.float64).reshape(5, -1)
    loss = preference_loss(name, pairs=pairs, weighting="wpo")
    policy_BK = groups[0].clone().requires_grad_()
    found_B = loss(policy_BK, *groups[1:], log_weights_BK=log_weights_BK)
    expected, capped = [], 0
    for row in range(5):
        ranked = sorted(range(num_responses), key=lambda k, row=row: -groups[2][row, k].item())
        compared = list(combinations(ranked, 2)) if pairs == "all" else [(ranked[0], ranked[-1])]
        costs = []
        for pair in compared:
            one = [tensor_BK[row : row + 1, list(pair)] for tensor_BK in groups]
            weight = math.exp(sum(log_weights_BK[row, k].item() for k in pair))
            capped += weight > 1
            costs.append(min(1, weight) * preference_loss(name)(*one).item())
        expected.append(mean(costs))
    torch.testing.assert_close(found_B.tolist(), expected)
    assert capped > 0
    (gradient_BK,) = torch.autograd.grad(found_B.sum(), policy_BK)
    assert gradient_BK.any()


def test_weights_have_no_gradient_and_masked_ones_do_not_count():
    policy_BK, *rest = random_groups(3, 3)
    log_weights_BK = torch.full((3, 3), -0.5, dtype=torch.float64, requires_grad=True)
    mask_BK = torch.tensor([[1, 1, 0]] * 3).bool()
    loss = preference_loss("dpo", weighting="wpo")
    found_B = loss(policy_BK.requires_grad_(), *rest, mask_BK, log_weights_BK=log_weights_BK)
    unweighted_B = preference_loss("dpo")(policy_BK, *rest, mask_BK)
    torch.testing.assert_close(found_B, math.exp(-1) * unweighted_B)
    assert torch.autograd.grad(found_B.sum(), log_weights_BK, allow_unused=True) == (None,)


def test_weights_are_for_losses_on_labels_and_must_be_given():
    with pytest.raises(InputError, match="loss 'rpo_bwd_kl' has no setting 'weighting'"):
        preference_loss("rpo_bwd_kl", weighting="wpo")
    with pytest.raises(InputError, match="weighting must be none or wpo, not 'on'"):
        preference_loss("dpo", weighting="on")
    with pytest.raises(InputError, match="weighting: wpo needs log_weights_BK"):
        preference_loss("dpo", weighting="wpo")(*random_groups(2, 2))


def test_ipo_is_the_squared_loss_to_a_gap_of_one_half_over_beta_squared():
    policy_BK, reference_BK, half_BK, lengths_BK = random_groups(5, 2)  # random_groups spaces rewards by one half
    squared = preference_loss("rpo_sq", beta=0.4)(policy_BK, reference_BK, half_BK, lengths_BK)
    ipo = preference_loss("ipo", beta=0.4)(policy_BK, reference_BK, half_BK, lengths_BK)
    torch.testing.assert_close(ipo, squared / 0.4**2)


@pytest.mark.parametrize("num_responses", [2, 3, 5])
def test_the_squared_loss_has_the_gradient_of_leave_one_out_reinforce(num_responses):
    groups = random_groups(5, num_responses)
    _, gradient_BK = value_and_gradient(preference_loss("rpo_sq", beta=1.0), groups)
    policy_BK, reference_BK, rewards_BK, _ = groups
    regret_BK = rewards_BK - (policy_BK - reference_BK)
    others_BK = (regret_BK.sum(dim=-1, keepdim=True) - regret_BK) / (num_responses - 1)
    torch.testing.assert_close(gradient_BK, -4 / num_responses * (regret_BK - others_BK))


@pytest.mark.parametrize("name", NAMES_LISTWISE)
def test_a_group_of_two_is_its_only_pair(name):
    groups = random_groups(9, 2)
    groups[2][0] = 1.0  # a tie
    expected = value_and_gradient(preference_loss(name, pairs="none"), groups)
    for pairs in ("all", "best_worst"):
        torch.testing.assert_close(value_and_gradient(preference_loss(name, pairs=pairs), groups), expected)


# beta, eta, gap of log-ratios, gap of rewards, and hand-computed values of five losses
CHECKED = [
    (0.2, 1, 0, 1, 0.693147, 6.25, 1, 0.110944, 0.120115),
    (0.2, 1, 5, 1, 0.313262, 6.25, 0, 0, 0),
    (0.1, 1, 5, 2, 0.474077, 0, 2.25, 0.168345, 0.219162),
    (0.1, 2, -3, 0.5, 0.854355, 64, 1.69, 0.191470, 0.205682),
    (0.5, 1, 4, -1, 0.126928, 9, 9, 1.006842, 0.828725),
    (0.05, 3, 10, 0.75, 0.474077, 0, 3.0625, 0.207009, 0.286826),
    (1, 1, math.log(4), math.log(1.5), 0.223144, 0.785518, 0.962026, 0.104650, 0.091516),
]
CHECKED_SLOPES = {0: (-0.1, -5, -0.4, -0.046212, -0.05), 4: (-0.059601, 6, 3, 0.305928, 0.157490)}
CHECKED_NAMES = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")


def one_group(log_ratios_K, rewards_K):
    """Return a group whose log-probabilities differ from the reference's by `log_ratios_K`."""
    ratios_BK = torch.tensor([log_ratios_K], dtype=torch.float64)
    reference_BK = torch.full_like(ratios_BK, -40)
    rewards_BK = torch.tensor([rewards_K], dtype=torch.float64)
    return reference_BK + ratios_BK, reference_BK, rewards_BK, torch.full_like(ratios_BK, 20)


@pytest.mark.parametrize("row", range(len(CHECKED)))
@pytest.mark.parametrize("column", range(5))
def test_pairs_have_the_published_values_and_slopes(row, column):
    beta, eta, ratio_gap, reward_gap, *values = CHECKED[row]
    name = CHECKED_NAMES[column]
    loss = preference_loss(name, beta=beta, **({"eta": eta} if LOSSES[name].uses_rewards else {}))
    # the hand-computed label losses prefer the first response regardless of the rewards
    loss_B, gradient_BK = value_and_gradient(
        loss, one_group([ratio_gap, 0], [reward_gap if loss.uses_rewards else 1, 0])
    )
    assert loss_B.item() == pytest.approx(values[column], abs=6e-7)
    assert gradient_BK.sum().item() == pytest.approx(0, abs=1e-12)
    if row in CHECKED_SLOPES:
        assert gradient_BK[0, 0].item() == pytest.approx(CHECKED_SLOPES[row][column], abs=6e-7)


@pytest.mark.parametrize(
    ("beta", "eta", "log_ratios_K", "rewards_K", "value", "slopes_K"),
    [
        (0.2, 0.2, [0, 0, 0, 0], [1, 2, 3, 4], 0.0245821, [0.0693428, 0.0293448, -0.0195088, -0.0791788]),
        (0.1, 1, [4, -2, 1, 0], [3, 1, 2, 0.5], 0.2337071, [-0.2929520, 0.1000436, 0.0182239, 0.1746846]),
        (0.2, 1, [5, 0], [1, 0], 0, [0, 0]),
    ],
)
def test_groups_have_hand_computed_values_and_slopes(beta, eta, log_ratios_K, rewards_K, value, slopes_K):
    loss = preference_loss("rpo_bwd_kl", beta=beta, eta=eta)
    loss_B, gradient_BK = value_and_gradient(loss, one_group(log_ratios_K, rewards_K))
    assert loss_B.item() == pytest.approx(value, abs=6e-8)
    assert (gradient_BK[0] / beta).tolist() == pytest.approx(slopes_K, abs=2e-7)


@pytest.mark.parametrize("garbage", [0.0, NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("num_there", [2, 3])
@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_a_masked_response_changes_neither_value_nor_gradient(name, pairs, num_there, garbage):
    loss = preference_loss(name, pairs=pairs)
    small = random_groups(4, num_there)
    small[0].sub_(2000)  # so that a masked response would have little weight even next to very unlikely ones
    expected_B, expected_gradient_BK = value_and_gradient(loss, small)
    places = [4, 1, 2][:num_there]  # of five, in any order
    large = [torch.full((4, 5), garbage, dtype=torch.float64) for _ in small]
    mask_BK = torch.zeros(4, 5, dtype=torch.bool)
    mask_BK[:, places] = True
    for tensor_BK, values_BK in zip(large, small, strict=True):
        tensor_BK[:, places] = values_BK.to(torch.float64)
    loss_B, gradient_BK = value_and_gradient(loss, large, mask_BK)
    torch.testing.assert_close(loss_B, expected_B)
    torch.testing.assert_close(gradient_BK[:, places], expected_gradient_BK)
    assert (gradient_BK[~mask_BK] == 0).all()


@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_a_group_without_comparisons_has_zero_loss(name, pairs):
    policy_BK, reference_BK, rewards_BK, lengths_BK = random_groups(4, 3)
    rewards_BK[2:] = 1.5
    mask_BK = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]]).bool()
    loss = preference_loss(name, pairs=pairs)
    groups = (policy_BK, reference_BK, rewards_BK, lengths_BK)
    loss_B, gradient_BK = value_and_gradient(loss, groups, mask_BK)
    num_empty = 2 if loss.uses_rewards else 4  # for a reward loss, equal rewards are a target of equal log-ratios
    assert loss_B[:num_empty].tolist() == [0] * num_empty
    assert (gradient_BK[:num_empty] == 0).all()
    assert (loss_B[num_empty:] > 0).all()
    alone = value_and_gradient(loss, [tensor_BK[:, :1] for tensor_BK in groups])
    torch.testing.assert_close(alone, (torch.zeros_like(loss_B), torch.zeros_like(policy_BK[:, :1])), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "pairs"), EVERY_FORM)
def test_extreme_inputs_give_finite_losses_and_gradients(name, pairs, dtype):
    gaps = torch.tensor([1e4, -1e4, 0, 37.0], dtype=dtype)
    policy_BK = torch.stack([gaps, -gaps, gaps.roll(1), gaps * 0])
    rewards_BK = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 1e-3], [1, 1, 1, 2]], dtype=dtype)
    extreme = {"eta": 1e6} if LOSSES[name].uses_rewards else {}
    loss = preference_loss(name, pairs=pairs, beta=1.0, **extreme)
    mask_BK = torch.ones_like(policy_BK, dtype=torch.bool)
    mask_BK[:, 1] = False
    for mask in (None, mask_BK):
        loss_B, gradient_BK = value_and_gradient(
            loss, (policy_BK, policy_BK * 0, rewards_BK, torch.ones_like(policy_BK)), mask
        )
        assert loss_B.dtype == dtype
        assert loss_B.isfinite().all()
        assert gradient_BK.isfinite().all()


def test_the_initial_loss_equals_its_closed_form():
    rewards_BK = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 5.0]], dtype=torch.float64)
    lengths_BK, zero_BK = torch.full_like(rewards_BK, 7), torch.zeros_like(rewards_BK)
    pair_BK, two_BK = rewards_BK[:, :2], lengths_BK[:, :2]
    p_B = [shares(row) for row in rewards_BK.tolist()]
    gaps = [2.0, 1.0]
    expected = {
        "dpo": [math.log(3)] * 2,
        "rpo_bwd_kl": [math.log(3) + sum(p * math.log(p) for p in p_K) for p_K in p_B],
        "rpo_fwd_kl": [-math.log(3) - mean(math.log(p) for p in p_K) for p_K in p_B],
        "rpo_sq": [2.0, 14.0],  # mean of 2², 1², 1² and of 1², 4², 5²
    }
    expected_of_two = {
        "dpo": [math.log(2)] * 2,
        "dpo_norm": [math.log(2)] * 2,
        "cdpo": [math.log(2)] * 2,
        "robust": [math.log(2)] * 2,
        "ipo": [25.0] * 2,
        "ipo_norm": [25.0] * 2,
        "exo": [0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001)] * 2,
        "apo_zero": [1.0] * 2,
        "apo_down": [1.0] * 2,
        "cpo": [math.log(2)] * 2,
        "orpo": [0.1 * math.log(2)] * 2,
        "hinge": [1.0] * 2,
        "rpo_bwd_kl": [bernoulli_kl(sigmoid(gap), 0.5) for gap in gaps],
        "rpo_fwd_kl": [-math.log(4 * sigmoid(gap) * sigmoid(-gap)) / 2 for gap in gaps],
        "rpo_sq": [gap**2 for gap in gaps],
    }
    for name, values in expected.items():
        loss_B = LOSSES[name](zero_BK, zero_BK, rewards_BK, lengths_BK)
        assert loss_B.tolist() == pytest.approx(values), name
    for name, values in expected_of_two.items():
        loss_B = LOSSES[name](zero_BK[:, :2], zero_BK[:, :2], pair_BK, two_BK)
        assert loss_B.tolist() == pytest.approx(values), name
    assert {*expected_of_two, "simpo"} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_uses_rewards_and_uses_reference_are_correct(name):
    policy_BK, reference_BK, rewards_BK, lengths_BK = random_groups(5, 3)
    loss = LOSSES[name]
    loss_B = loss(policy_BK, reference_BK, rewards_BK, lengths_BK)
    same_order_B = loss(policy_BK, reference_BK, rewards_BK**3, lengths_BK)
    other_reference_B = loss(policy_BK, reference_BK.roll(1), rewards_BK, lengths_BK)
    assert loss.uses_rewards is not torch.equal(same_order_B, loss_B)
    assert loss.uses_reference is not torch.equal(other_reference_B, loss_B)


def test_implicit_rewards_are_scaled_log_ratios_and_zero_where_masked():
    policy_BK, reference_BK = torch.tensor([[-8.0, -5.0, NAN]]), torch.tensor([[-10.0, -9.0, 0.0]])
    lengths_BK, mask_BK = torch.tensor([[4, 2, 0]]), torch.tensor([[True, True, False]])
    for settings, expected in [({}, [1, 2, 0]), ({"per_token": True}, [0.25, 1, 0])]:
        loss = preference_loss("rpo_sq", beta=0.5, **settings)
        assert loss.implicit_rewards(policy_BK, reference_BK, lengths_BK, mask_BK).tolist() == [expected]
    loss = preference_loss("dpo", beta=0.5, reference_free=True)
    assert loss.implicit_rewards(policy_BK, reference_BK, lengths_BK, mask_BK).tolist() == [[-4, -2.5, 0]]


OTHER_VALUES = {
    "beta": 0.7,
    "eta": 0.3,
    "label_smoothing": 0.2,
    "gamma": 0.4,
    "pairs": "best_worst",
    "per_token": True,
    "reference_free": True,
    "length_penalty": 0.05,
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_setting_changes_the_loss_or_is_rejected(name):
    groups = random_groups(5, 4)
    for setting, value in OTHER_VALUES.items():
        if setting not in LOSSES[name].settings:
            with pytest.raises(InputError, match=f"loss '{name}' has no setting '{setting}'; .*beta"):
                preference_loss(name, **{setting: value})
            continue
        value = not value if getattr(LOSSES[name], setting) is value else value
        assert not torch.allclose(preference_loss(name, **{setting: value})(*groups), LOSSES[name](*groups)), setting


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rpo_bwdkl", {}, "did you mean 'rpo_bwd_kl'"),
        ("dpo", {"betta": 0.1}, "did you mean 'beta'"),
        ("dpo", {"beta": 0}, "loss 'dpo': beta must be a number above 0, not 0"),
        ("dpo", {"beta": True}, "beta must be a number above 0, not True"),
        ("dpo", {"beta": "0.1"}, "beta must be a number above 0, not '0.1'"),
        ("rpo_sq", {"eta": INF}, "eta must be a number above 0, not inf"),
        ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing must be a number in \[0, 0.5\), not 0.5"),
        ("exo", {"label_smoothing": 0}, "label_smoothing must be above 0 for exo"),
        ("simpo", {"gamma": -1}, "gamma must be a number of at least 0, not -1"),
        ("dpo", {"pairs": "some"}, "pairs must be one of none, all, best_worst, not 'some'"),
        ("dpo", {"per_token": 1}, "per_token must be true or false, not 1"),
        ("ipo", {"pairs": "none"}, "pairs must be 'all' or 'best_worst' for a pairwise loss"),
        ("no.such.module:make", {}, "cannot be imported"),
        ("math:pi", {}, "not a callable"),
        ("math:dist", {"speed": 1}, "does not accept the settings"),
        ("math:factorial", {}, "does not accept the settings"),
    ],
)
def test_errors_suggest_valid_names_and_values(name, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        preference_loss(name, **settings)
    assert "\n" not in str(caught.value)


def test_a_loss_rejects_settings_that_it_does_not_read():
    with pytest.raises(InputError, match="this loss has no setting 'gamma'"):
        PreferenceLoss(LOSSES["dpo"].distance, gamma=2.0)


OWN = """
from align.losses.preference import PreferenceLoss
from align.losses.distances import Distance

def exponential(slope=1.0):
    return lambda policy, reference, rewards, lengths, mask=None: (-slope * (policy[:, 0] - policy[:, 1])).exp()

def negative_margin(comparisons):
    return -(comparisons.implicit_BPC[..., 0] - comparisons.implicit_BPC[..., 1])

def linear(**settings):
    return PreferenceLoss(Distance(negative_margin), pairs="all", **settings)

def number():
    return 3

def direct(policy_BK, reference_BK, rewards_BK, lengths_BK, mask_BK, *, slope=1.0):
    return exponential(slope)(policy_BK, reference_BK, rewards_BK, lengths_BK, mask_BK)
"""


def test_custom_losses_and_distances_load_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    groups = policy_BK, reference_BK, _, _ = random_groups(3, 2)
    loss = preference_loss("own_losses:exponential", slope=0.5)
    assert isinstance(loss, CustomLoss)
    assert loss(*groups, None).tolist() == pytest.approx([math.exp(-0.5 * (a - b)) for a, b in policy_BK.tolist()])
    torch.testing.assert_close(loss.implicit_rewards(*groups[:2], groups[3]), policy_BK - reference_BK)
    assert loss.uses_rewards
    assert loss.uses_reference
    direct = preference_loss("own_losses:direct", slope=0.5)
    assert isinstance(direct, CustomLoss)
    assert (direct.path, direct.given) == ("own_losses:direct", {"slope": 0.5})
    torch.testing.assert_close(direct(*groups, None), loss(*groups, None))
    linear = preference_loss("own_losses:linear", beta=0.5)
    assert isinstance(linear, PreferenceLoss)
    hinge = preference_loss("hinge", beta=0.5)  # is 1 + linear where it is positive
    torch.testing.assert_close((1 + linear(*groups)).relu(), hinge(*groups))
    with pytest.raises(InputError, match="must return a function that returns loss_B, not 3"):
        preference_loss("own_losses:number")
    with pytest.raises(InputError, match="unexpected keyword argument 'steepness'"):
        preference_loss("own_losses:exponential", steepness=2)
