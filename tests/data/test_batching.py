"""The batch plan: every group once, within the token budget, with equally many micro-batches per rank."""

import random
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from align.data import batching
from align.data.balance import imbalance, min_imbalance
from align.data.batching import groups_of_step, order, plan_step, steps_per_epoch

sys.path.append(str(Path(__file__).parents[2]))  # so that tests.benchmarks can be imported

from tests.benchmarks.planning import LENGTHS, drawn  # noqa: E402 - after the line above

SIZES = {
    "equal": [100] * 40,
    "one": [7],
    "two": [3, 900],
    "real": [int(random.Random(0).lognormvariate(6.5, 0.7)) + 20 for _ in range(64)],
    "one very large": [10_000, *[20] * 30],
    "all over the budget": [5_000] * 9,
    "slightly over half a budget": [520] * 205,
    "small": list(range(1, 50)),
}
BUDGETS = [1, 64, 512, 1000, 4096, 10**9]
RANKS = [1, 2, 3, 8, 64]


def micro_batches(plan):
    return [micro for share in plan.ranks for micro in share]


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SIZES)
def test_every_group_is_planned_once_within_the_budget_and_ranks_run_equally_often(name, budget, num_ranks):
    sizes = SIZES[name]
    groups = random.Random(1).sample(range(len(sizes)), len(sizes))
    plan = plan_step(groups, sizes, token_budget=budget, num_ranks=num_ranks)
    assert plan.groups == tuple(groups)
    assert Counter(group for micro in micro_batches(plan) for group in micro) == Counter(groups)
    assert len(plan.ranks) == num_ranks
    assert len({len(share) for share in plan.ranks}) == 1
    for micro in micro_batches(plan):
        assert len(micro) <= 1 or sum(sizes[group] for group in micro) <= budget


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SIZES)
def test_empty_micro_batches_are_only_what_equal_numbers_need(name, budget, num_ranks):
    plan = plan_step(range(len(SIZES[name])), SIZES[name], token_budget=budget, num_ranks=num_ranks)
    num_empty = sum(not micro for micro in micro_batches(plan))
    assert num_empty < num_ranks, "an empty micro-batch computes a group without effect"


def test_a_group_over_the_budget_adds_no_micro_batch():
    plan = plan_step(range(8), [5_000] * 8, token_budget=512, num_ranks=2)
    assert [len(share) for share in plan.ranks] == [4, 4]


def test_the_number_of_micro_batches_is_near_the_minimum():
    sizes = SIZES["real"]
    for budget in (2048, 4096, 16384):
        fewest = -(-sum(sizes) // budget)
        plan = plan_step(range(len(sizes)), sizes, token_budget=budget)
        assert fewest <= len(plan.ranks[0]) <= 1.25 * fewest + 1


def test_the_plan_does_not_depend_on_the_order_of_the_groups():
    sizes = SIZES["real"]
    first = plan_step(range(64), sizes, token_budget=4096, num_ranks=3)
    second = plan_step(range(63, -1, -1), sizes, token_budget=4096, num_ranks=3)
    assert first.ranks == second.ranks
    assert second.groups == tuple(range(63, -1, -1))


def test_sizes_of_other_groups_do_not_affect_the_plan():
    sizes = [10**6, *SIZES["small"]]
    groups = [3, 5, 8, 20]
    alone = plan_step(groups, sizes, token_budget=64, num_ranks=2)
    assert alone == plan_step(groups, [0, *SIZES["small"]], token_budget=64, num_ranks=2)


@pytest.mark.parametrize(("num_groups", "num_ranks", "most"), [(256, 2, 1.02), (256, 8, 1.1), (64, 2, 1.06)])
def test_ranks_get_nearly_equal_tokens_on_realistic_lengths(num_groups, num_ranks, most):
    draw = random.Random(2)
    for _ in range(50):
        sizes = [int(draw.lognormvariate(6.5, 0.7)) + 20 for _ in range(num_groups)]
        plan = plan_step(range(num_groups), sizes, token_budget=8192, num_ranks=num_ranks)
        loads = [sum(sizes[group] for micro in share for group in micro) for share in plan.ranks]
        assert max(loads) / (sum(sizes) / num_ranks) <= most
        assert imbalance(plan, sizes) == pytest.approx(max(loads) / (sum(sizes) / num_ranks))


# Ranks, the fewest groups per step for which the lower bound allows an even plan, and the expected imbalance
EVEN = [(8, 128, 1.02), (64, 256, 1.05), (64, 1024, 1.02)]


@pytest.mark.parametrize(("num_ranks", "prompts_per_step", "most"), EVEN)
@pytest.mark.parametrize("budget", [1024, 2048, 8192])
def test_pairs_with_ultrafeedback_lengths_are_divided_evenly(num_ranks, prompts_per_step, most, budget):
    found = []
    for step in range(20):
        sizes = drawn("UltraFeedback, pairs", prompts_per_step, seed=step)
        plan = plan_step(range(prompts_per_step), sizes, token_budget=budget, num_ranks=num_ranks)
        found.append(imbalance(plan, sizes))
    assert max(found) <= most


@pytest.mark.parametrize("name", [name for name in LENGTHS if "GSM8K" not in name])  # its lower bound is loose
def test_two_long_groups_per_rank_reach_the_lower_bound(name):
    for step in range(20):
        sizes = drawn(name, 128, seed=step)
        plan = plan_step(range(128), sizes, token_budget=8192, num_ranks=64)
        assert imbalance(plan, sizes) <= 1.05 * min_imbalance(range(128), sizes, num_ranks=64)


def test_one_more_micro_batch_is_used_if_it_balances_the_ranks():
    sizes = [4796, *[390] * 120]  # six micro-batches are too few for the other ranks
    plan = plan_step(range(121), sizes, token_budget=1024, num_ranks=8)
    assert imbalance(plan, sizes) <= 1.07
    assert max(len(share) for share in plan.ranks) <= 9


def test_the_lower_bound_holds_and_is_sometimes_reached():
    draw, reached = random.Random(7), 0
    for _ in range(60):
        num_ranks = draw.randint(1, 3)
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 6))]
        best = min(
            max(sum(size for size, at in zip(sizes, deal, strict=True) if at == rank) for rank in range(num_ranks))
            for deal in product(range(num_ranks), repeat=len(sizes))
        )
        bound = min_imbalance(range(len(sizes)), sizes, num_ranks=num_ranks)
        assert bound * sum(sizes) / num_ranks <= best + 1e-9
        reached += bound * sum(sizes) / num_ranks == pytest.approx(best)
    assert reached >= 30


def test_sizes_can_be_an_array():
    sizes = SIZES["real"]
    listed = plan_step(range(64), sizes, token_budget=4096, num_ranks=3)
    column = plan_step(range(64), np.array(sizes, np.int32), token_budget=4096, num_ranks=3)
    assert column == listed
    assert {type(group) for micro in micro_batches(column) for group in micro} == {int}
    assert imbalance(column, np.array(sizes, np.int32)) == imbalance(listed, sizes)


def test_groups_over_the_budget_are_divided_evenly():
    sizes = [100 * size for size in range(1, 65)]
    assert imbalance(plan_step(range(64), sizes, token_budget=1, num_ranks=8), sizes) <= 1.01


@pytest.mark.parametrize(("budget", "num_ranks"), [(600, 64), (2048, 64), (8192, 64), (600, 1), (1000, 1)])
@pytest.mark.parametrize("alike", [False, True])
def test_ten_thousand_groups_need_few_attempts(budget, num_ranks, alike, monkeypatch):
    draw = random.Random(3)
    sizes = [520 if alike else int(draw.lognormvariate(6.5, 0.7)) + 20 for _ in range(10_000)]
    attempts = []
    assign = batching._assign
    monkeypatch.setattr(batching, "_assign", lambda *args, **kwargs: attempts.append(1) or assign(*args, **kwargs))
    plan_step(range(10_000), sizes, token_budget=budget, num_ranks=num_ranks)
    assert len(attempts) < 64, "the number of attempts must not grow with the number of groups"


@pytest.mark.parametrize("num_groups", [1, 2, 7, 100])
def test_the_order_depends_on_seed_and_epoch_only(num_groups):
    random.seed(1)
    first = order(num_groups, seed=3, epoch=2)
    random.seed(2)
    assert order(num_groups, seed=3, epoch=2) == first
    assert sorted(first) == list(range(num_groups))
    if num_groups == 100:
        others = [order(100, seed=3, epoch=1), order(100, seed=2, epoch=2), order(100, seed=2, epoch=3)]
        assert len({tuple(each) for each in [first, *others]}) == 4
        assert list(first) != sorted(first)


@pytest.mark.slow
def test_the_order_of_many_groups_equals_a_shuffled_list_in_four_bytes_per_group():
    indices = list(range(10**6))
    found = order(10**6, seed=4, epoch=1)
    random.Random(batching.hashlib.sha256(repr((4, "order", 1)).encode()).digest()).shuffle(indices)
    assert list(found) == indices
    assert found.itemsize * len(found) == 4 * 10**6


def test_the_order_is_the_same_on_every_machine():
    golden = [5, 6, 0, 1, 2, 7, 3, 4]  # another order would change the results of resumed runs
    assert list(order(8, seed=0, epoch=0)) == golden


@pytest.mark.parametrize("prompts_per_step", [1, 3, 8, 20])
def test_every_epoch_takes_every_group_once(prompts_per_step):
    num_groups = 20
    steps = steps_per_epoch(num_groups, prompts_per_step)
    taken = [groups_of_step(step, num_groups, prompts_per_step, seed=5) for step in range(3 * steps)]
    for epoch in range(3):
        of_epoch = [group for step in taken[epoch * steps : (epoch + 1) * steps] for group in step]
        assert of_epoch == list(order(num_groups, seed=5, epoch=epoch))
    assert all(len(step) <= prompts_per_step for step in taken)
    assert sum(len(step) < prompts_per_step for step in taken) == (3 if num_groups % prompts_per_step else 0)


def test_the_groups_of_a_step_do_not_depend_on_other_steps():
    late = groups_of_step(11, 50, 8, seed=1)
    for step in range(11):
        groups_of_step(step, 50, 8, seed=1)
    assert groups_of_step(11, 50, 8, seed=1) == late
