"""Mixtures against brute force over exact fractions: shares, order and independence of the number of ranks."""

import random
from collections import Counter
from fractions import Fraction
from itertools import count

import pytest

from align.data.batching import groups_of_step, plan_step, steps_per_epoch
from align.data.mixing import Mixture, shares_of
from align.errors import InputError

NUM_CASES = 200


def cases(seed=0):
    """Yield sizes, exact shares and weights of one to five sources."""
    draw = random.Random(seed)
    for _ in range(NUM_CASES):
        weights = [Fraction(draw.randint(1, 20), draw.choice([1, 3, 7])) for _ in range(draw.randint(1, 5))]
        sizes = tuple(draw.choice([1, 2, 7, draw.randint(1, 60)]) for _ in weights)
        yield sizes, [weight / sum(weights) for weight in weights], [float(weight) for weight in weights]


def mixtures(exhausted):
    """Yield random mixtures with their exact shares."""
    for number, (sizes, exact, weights) in enumerate(cases()):
        given = {f"source {place}": weight for place, weight in enumerate(weights)}
        yield Mixture(sizes, tuple(shares_of(given, {}, 0.0).values()), exhausted, seed=number), exact


def sources(mixture, rows):
    """Return the source of each row."""
    of_row = [source for source, size in enumerate(mixture.sizes) for _ in range(size)]
    return [of_row[row] for row in rows]


def ends(exhausted, sizes, shares):
    """Return the rows of an epoch by counting: until a source cannot give its share, or until all are exhausted."""
    for number in count(1):
        gaps = [size - share * number for size, share in zip(sizes, shares, strict=True)]
        if exhausted == "first_exhausted" and min(gaps) < 0:
            return number - 1
        if exhausted == "all_exhausted" and max(gaps) <= 0:
            return number
    raise AssertionError


@pytest.mark.parametrize("exhausted", ["first_exhausted", "all_exhausted"])
def test_shares_of_an_epoch_are_exact_within_one_row(exhausted):
    num_rows = 0
    for mixture, shares in mixtures(exhausted):
        rows = mixture.epoch(0)
        assert len(rows) == mixture.num_rows == ends(exhausted, mixture.sizes, shares)
        given = Counter(sources(mixture, rows))
        for source, share in enumerate(shares):
            assert abs(given[source] - share * len(rows)) < 1, (mixture, source)
        if exhausted == "first_exhausted":
            assert len(set(rows)) == len(rows)  # no row is repeated
        else:
            assert set(rows) == set(range(sum(mixture.sizes)))  # no row is missing
        num_rows += len(rows)
    print(f"{NUM_CASES} mixtures, {num_rows} rows")


def test_down_weight_uses_each_row_once_in_the_remaining_shares():
    for mixture, shares in mixtures("down_weight"):
        rows = mixture.epoch(3)
        assert sorted(rows) == list(range(sum(mixture.sizes)))
        order, given = sources(mixture, rows), Counter()
        there = set(range(len(shares)))
        since, begun = 0, Counter()  # position and counts when a source was last exhausted
        for at, source in enumerate(order, start=1):
            given[source] += 1
            left = sum(shares[each] for each in there)
            for each in there:
                share = shares[each] / left
                # Each source deviates by at most one row, so the length of the prefix deviates by at most their sum
                assert abs(given[each] - begun[each] - share * (at - since)) <= 2 * (1 + share * len(there))
            if given[source] == mixture.sizes[source]:
                there -= {source}
                since, begun = at, Counter(given)


@pytest.mark.parametrize("exhausted", ["first_exhausted", "all_exhausted"])
def test_every_prefix_of_an_epoch_keeps_the_shares(exhausted):
    for mixture, _ in mixtures(exhausted):
        order, given = sources(mixture, mixture.epoch(1)), Counter()
        whole, size = Counter(order), len(order)
        for at, source in enumerate(order, start=1):
            given[source] += 1
            for each, number in whole.items():  # within one row of its own, and one of every other source
                assert abs(given[each] * size - number * at) <= size + number * len(whole), (mixture, at)


@pytest.mark.parametrize("exhausted", ["first_exhausted", "all_exhausted", "down_weight"])
def test_rows_of_a_source_are_used_equally_often_over_epochs(exhausted):
    for mixture, _ in mixtures(exhausted):
        used = Counter()
        for number in range(4):
            used.update(mixture.epoch(number))
            start = 0
            for size in mixture.sizes:
                times = [used[row] for row in range(start, start + size)]
                assert max(times) - min(times) <= 1
                start += size


def test_an_epoch_depends_on_its_number_only():
    made = Mixture((30, 50, 7), (0.5, 0.3, 0.2), "all_exhausted", seed=1)
    in_order = [made.epoch(number) for number in range(6)]
    for number in random.Random(0).sample(range(6), 6):
        assert Mixture((30, 50, 7), (0.5, 0.3, 0.2), "all_exhausted", seed=1).epoch(number) == in_order[number]
    assert len({tuple(epoch) for epoch in in_order}) == 6
    assert Mixture((30, 50, 7), (0.5, 0.3, 0.2), "all_exhausted", seed=2).epoch(0) != in_order[0]


@pytest.mark.parametrize("exhausted", ["first_exhausted", "all_exhausted", "down_weight"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_steps_do_not_depend_on_the_number_of_ranks(exhausted, num_ranks):
    made, draw, per_step = Mixture((40, 11, 5), (0.7, 0.2, 0.1), exhausted), random.Random(0), 6
    sizes = [draw.randint(5, 60) for _ in range(56)]
    a_step = steps_per_epoch(made.num_rows, per_step)
    for epoch in range(3):
        whole = made.epoch(epoch)
        for step in random.Random(epoch).sample(range(a_step), a_step):  # a resumed run can start at any step
            chosen = groups_of_step(epoch * a_step + step, made.num_rows, per_step, epoch_of=made.epoch)
            assert list(chosen) == list(whole[step * per_step : (step + 1) * per_step])
            plan = plan_step(chosen, sizes, token_budget=100, num_ranks=num_ranks)
            done = [group for rank in plan.ranks for micro in rank for group in micro]
            assert sorted(done) == sorted(chosen)
            assert len(plan.ranks) == num_ranks and len({len(rank) for rank in plan.ranks}) == 1


def test_replay_takes_its_share_and_keeps_the_ratio_of_other_sources():
    shares = shares_of({"chat": 3.0, "maths": 1.0}, {"code": 2.0, "sql": 2.0}, 0.02)
    assert shares == pytest.approx({"chat": 0.735, "maths": 0.245, "code": 0.01, "sql": 0.01})
    made = Mixture((9000, 4000, 500, 500), tuple(shares.values()))
    given = Counter(sources(made, made.epoch(0)))
    replayed = given[2] + given[3]
    assert abs(replayed - 0.02 * made.num_rows) < 2 and made.num_rows == 12244  # 9000 / 0.735


WRONG = [
    (lambda: shares_of({"chat": 1.0, "code": 0.0}, {}, 0.0), "data.code: the weight is 0.0; a number above 0"),
    (lambda: shares_of({"chat": -1.0}, {}, 0.0), "data.chat: the weight is -1.0"),
    (lambda: shares_of({"chat": float("inf")}, {}, 0.0), "data.chat: the weight is inf"),
    (lambda: shares_of({"chat": 1.0}, {"chat": 1.0}, 0.1), "replay: 'chat' is a source of the step itself"),
    (lambda: Mixture((3, 0), (0.5, 0.5)), r"have \(3, 0\) rows; each needs at least one"),
    (lambda: Mixture((3, 0), (0.5, 0.5), "all_exhausted"), "each needs at least one"),
    (lambda: Mixture((0,), (1.0,), "down_weight"), "each needs at least one"),
    (lambda: Mixture((3, 3), (0.5, 0.6)), "sum to 1"),
    (lambda: Mixture((3, 3), (1.0, 0.0)), "above 0"),
]


@pytest.mark.parametrize(
    ("exhausted", "own_rows"), [("first_exhausted", 150), ("all_exhausted", 400), ("down_weight", 300)]
)
@pytest.mark.parametrize("size", [1, 3, 50, 10_000])
def test_replayed_sources_do_not_affect_the_length_of_an_epoch(exhausted, own_rows, size):
    shares = shares_of({"a": 1.0, "b": 1.0}, {"c": 3.0, "d": 1.0}, 0.2)  # c and d have few rows or many
    sizes = (100, 200, size, size)
    sizes = (75, 200, size, size) if exhausted == "first_exhausted" else sizes
    mixture = Mixture(sizes, tuple(shares.values()), exhausted, num_replayed=2)
    given = Counter(sources(mixture, mixture.epoch(0)))
    assert given[0] + given[1] == own_rows
    whole = own_rows / 0.8
    assert abs(given.total() - whole) < 1
    assert abs(given[2] - 0.15 * whole) < 1
    assert abs(given[3] - 0.05 * whole) < 1
    if exhausted == "down_weight":
        assert (given[0], given[1]) == (100, 200)


@pytest.mark.parametrize(("make", "said"), WRONG)
def test_invalid_mixtures_are_rejected(make, said):
    with pytest.raises(InputError, match=said):
        make()
