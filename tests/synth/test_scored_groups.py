import json
from collections import Counter
from itertools import combinations
from statistics import fmean, pstdev

import pytest

from align.config import build
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.reading import read
from align.data.tokenizer import train_tokenizer
from align.data.writing import write
from align.distributed.journal import Journal
from align.errors import InputError
from align.inference.samples import TOO_LONG, Sample, prompt_key
from align.records import Comparison, Demonstration, Message, Prompt, Response
from align.rewards.verdicts import Verdict
from align.synth.group_statistics import GroupStatistics, pass_rate
from align.synth.scored_groups import comparisons, evenly_spaced, prompt_of, score_groups, unscored_comparisons
from align.synth.settings import GroupSettings
from align.train.filters import best_demonstration


def prompt(text, **metadata):
    return Prompt((Message("user", text),), metadata)


def sample(asked, number, text, policy="p", finish="stop"):
    return Sample(prompt_key(asked), number, policy, text, len(text), finish, 7)


def samples(asked, *texts, policy="p"):
    return [sample(asked, number, text, policy) for number, text in enumerate(texts)]


class ByLength:
    """A judge whose reward is the number of letters; it records its calls."""

    def __init__(self):
        self.asked = []

    def __call__(self, groups):
        for asked, responses in groups:
            self.asked.append((asked.messages[-1].content, tuple(responses)))
            yield tuple(
                Verdict(None, why="a question") if "?" in text else Verdict(float(len(text)), {"letters": len(text)})
                for text in responses
            )


def made(tmp_path, prompts, given, settings=GroupSettings(), judge=None):  # noqa: B008 - frozen
    statistics = GroupStatistics()
    with Journal(tmp_path / "verdicts", {}) as journal:
        scored = score_groups(prompts, given, judge or ByLength(), journal=journal, statistics=statistics)
        return list(comparisons(scored, settings, statistics)), statistics


Q, R = prompt("Q", key=1), prompt("R", key=2)


def texts(comparison):
    return [response.content for response in comparison.responses]


def test_responses_become_a_group_with_the_best_first(tmp_path):
    (group,), _ = made(tmp_path, [Q], samples(Q, "bb", "a", "ccc"))
    assert texts(group) == ["ccc", "bb", "a"]
    assert [response.reward for response in group.responses] == [3, 2, 1]
    assert group.responses[0].attributes == {"letters": 3}


def test_origins_are_stored_in_the_order_of_the_responses(tmp_path):
    given = [*samples(Q, "bb", policy="first"), *samples(Q, "a", "ccc", policy="second")]
    (group,), _ = made(tmp_path, [Q], given)
    origins = group.metadata["origins"]
    assert [(origin["policy"], origin["number"]) for origin in origins] == [("second", 1), ("first", 0), ("second", 0)]
    assert {origin["seed"] for origin in origins} == {7}
    assert group.metadata["key"] == 1


def test_groups_survive_writing_and_reading(tmp_path):
    groups, _ = made(tmp_path, [Q], samples(Q, "bb", "a"))
    write(tmp_path / "groups.jsonl", groups)
    assert read(str(tmp_path / "groups.jsonl")).records == groups
    json.loads((tmp_path / "groups.jsonl").read_text())


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        (("aa", "bb"), {}, "groups:left out, a tie"),
        (("aa", "b"), {"min_gap": 1.5}, "groups:left out, gap below min_gap"),
        (("aa", "b"), {"min_best": 3.0}, "groups:left out, best reward below min_best"),
        (("aa", "b?"), {}, "groups:left out, fewer than two responses with a verdict"),
        (("aa", "aa"), {}, "groups:left out, fewer than two responses with a verdict"),
        (("aa", "  "), {}, "groups:left out, fewer than two responses with a verdict"),
    ],
)
def test_dropped_groups_are_counted_by_reason(tmp_path, given, settings, reason):
    groups, statistics = made(tmp_path, [Q], samples(Q, *given), GroupSettings(**settings))
    assert groups == []
    assert statistics.counts[reason] == 1
    assert statistics.counts["groups"] == 0


def test_groups_at_the_limits_are_kept(tmp_path):
    groups, _ = made(tmp_path, [Q], samples(Q, "aa", "b"), GroupSettings(min_gap=1.0, min_best=2.0))
    assert len(groups) == 1


def test_empty_duplicate_and_unjudged_responses_are_counted(tmp_path):
    _, statistics = made(tmp_path, [Q], samples(Q, "aa", "b", "", "b", "c?"))
    assert statistics.counts["responses"] == 5
    assert statistics.counts["responses:left out, empty"] == 1
    assert statistics.counts["responses:left out, duplicate"] == 1
    assert statistics.counts["responses:left out, no verdict"] == 1


def test_a_truncated_response_gets_cut_reward_and_is_counted(tmp_path):
    given = [sample(Q, 0, "bb"), sample(Q, 1, "cccc", finish="length"), sample(Q, 2, "?", finish="length")]
    (group,), statistics = made(tmp_path, [Q], given, GroupSettings(cut_reward=-1.0))
    assert [(response.content, response.reward) for response in group.responses] == [("bb", 2.0), ("cccc", -1.0)]
    assert statistics.counts["responses:truncated, with cut_reward"] == 1
    (group,), _ = made(tmp_path / "kept", [Q], given)
    assert [response.reward for response in group.responses] == [4.0, 2.0]


@pytest.mark.parametrize("scored", [True, False])
def test_a_sample_that_was_cut_off_is_trained_on_its_own_tokens_only(tmp_path, scored):
    given = [sample(Q, 0, "far away", finish="length"), sample(Q, 1, "no")]
    if scored:
        found, _ = made(tmp_path, [Q], given)
    else:
        found = list(unscored_comparisons([Q], given, GroupStatistics()))
    write(tmp_path / "groups.jsonl", found)
    (record,) = read(str(tmp_path / "groups.jsonl")).records
    assert [response.finish for response in record.responses] == ["length", "stop"]
    tokenizer = train_tokenizer(["a b"], vocab_size=259, chat_template="")  # one token a byte
    apply_template(tokenizer, "chatml")
    (best,) = [best_demonstration(each, Counter()) for each in found] if scored else [None]
    group = ChatEncoder(tokenizer).encode(record, 0)
    assert group.response_lengths == (len("far away"), len("no") + 1)
    if best is not None:
        assert ChatEncoder(tokenizer).encode(best, 0).response_lengths == (len("far away"),)


def test_only_best_and_worst_can_be_kept(tmp_path):
    (group,), statistics = made(tmp_path, [Q], samples(Q, "bb", "a", "ccc"), GroupSettings(keep="best_worst"))
    assert texts(group) == ["ccc", "a"]
    assert statistics.counts["responses:left out, over the maximum number"] == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [(("bb", "a", "ccc"), ["ccc"]), (("aa", "bb"), ["aa"]), (("aa",), ["aa"]), (("a", "b"), []), (("a?", "bb?"), [])],
)
def test_the_best_response_alone_is_kept_with_ties_and_single_responses(tmp_path, given, expected):
    groups, statistics = made(tmp_path, [Q], samples(Q, *given), GroupSettings(keep="best", min_best=2.0))
    assert [text for group in groups for text in texts(group)] == expected
    dropped = {name: count for name, count in statistics.counts.items() if name.startswith("groups:") and count}
    assert sum(dropped.values()) == 1 - len(expected)
    assert statistics.report()["gap_mean"] == (0.0 if expected else None)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_responses_whose_rewards_vary_most_are_kept(tmp_path, number):
    given = ["a", "bbbb", "cc", "d" * 9, "e" * 8, "f" * 7]  # rewards are lengths
    settings = GroupSettings(keep="most_variance", max_responses=number)
    (group,), statistics = made(tmp_path, [Q], samples(Q, *given), settings)
    kept = [len(text) for text in texts(group)]
    assert kept == sorted(kept, reverse=True) and len(kept) == number
    most = max(pstdev(each) for each in combinations(map(len, given), number))
    assert pstdev(kept) == pytest.approx(most)
    assert statistics.counts["responses:left out, over the maximum number"] == len(given) - number


def test_the_best_response_and_one_two_deviations_below_the_mean_are_kept(tmp_path):
    lengths = [1, 20, *range(50, 78)]  # rewards; the mean is 60 and the deviation 15.6
    (group,), _ = made(tmp_path, [Q], samples(Q, *("x" * each for each in lengths)), GroupSettings(keep="best_and_low"))
    assert [len(text) for text in texts(group)] == [77, 20]
    assert fmean(lengths) - 2 * pstdev(lengths) == pytest.approx(29, abs=1)


@pytest.mark.parametrize(
    ("keep", "setting"),
    [
        ("best", "min_gap"),
        ("best", "max_responses"),
        ("best_worst", "max_responses"),
        ("best_and_low", "max_responses"),
    ],
)
def test_a_setting_without_effect_on_what_is_kept_is_refused(keep, setting):
    with pytest.raises(InputError, match=rf"^{setting}: has no effect with keep: {keep}, which keeps"):
        build(GroupSettings, {"keep": keep, setting: 3})


def test_most_variance_needs_the_number_of_responses():
    with pytest.raises(InputError, match="^max_responses: is needed"):
        build(GroupSettings, {"keep": "most_variance"})


@pytest.mark.parametrize(
    ("size", "most", "places"),
    [(5, 1, [0]), (5, 5, [0, 1, 2, 3, 4]), (5, 2, [0, 4]), (5, 3, [0, 2, 4]), (2, 8, [0, 1]), (9, 3, [0, 4, 8])],
)
def test_evenly_spaced_keeps_first_last_and_between(size, most, places):
    assert evenly_spaced(size, most) == places


@pytest.mark.parametrize("most", range(2, 9))
def test_evenly_spaced_indices_are_distinct(most):
    for size in range(most, 30):
        places = evenly_spaced(size, most)
        assert len(set(places)) == most
        assert (places[0], places[-1]) == (0, size - 1)


def test_duplicate_prompts_form_one_group(tmp_path):
    groups, statistics = made(tmp_path, [Q, R, Q], [*samples(Q, "a", "bb"), *samples(R, "a", "bb")])
    assert len(groups) == 2
    assert statistics.counts["prompts:duplicate"] == 1


def test_a_prompt_without_responses_is_counted(tmp_path):
    groups, statistics = made(tmp_path, [Q, R], samples(Q, "a", "bb"))
    assert len(groups) == 1
    assert statistics.counts["prompts:left out, no response"] == 1


def test_prompts_too_long_to_sample_are_counted(tmp_path):
    unasked = [sample(R, number, "", finish=TOO_LONG) for number in range(2)]
    groups, statistics = made(tmp_path, [Q, R], [*unasked, *samples(Q, "a", "bb")])
    assert len(groups) == 1
    assert statistics.counts["responses"] == 2
    assert statistics.counts["responses:not sampled, prompt too long"] == 2
    assert statistics.counts["prompts:left out, no response"] == 1
    assert statistics.counts["responses:left out, empty"] == 0


def test_verdicts_in_the_journal_are_not_judged_again(tmp_path):
    class Stops(ByLength):
        def __call__(self, groups):
            yield next(super().__call__(groups))
            raise KeyboardInterrupt

    given = [*samples(Q, "a", "bb"), *samples(R, "a", "bb")]
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, [Q, R], given, judge=Stops())
    judge = ByLength()
    groups, _ = made(tmp_path, [Q, R], given, judge=judge)
    assert [asked for asked, _ in judge.asked] == ["R"]
    assert groups == made(tmp_path / "afresh", [Q, R], given)[0]


def test_other_responses_to_a_prompt_are_judged_again(tmp_path):
    made(tmp_path, [Q], samples(Q, "a", "bb"))
    judge = ByLength()
    made(tmp_path, [Q], samples(Q, "a", "ccc"), judge=judge)
    assert judge.asked == [("Q", ("a", "ccc"))]


def test_a_judge_with_too_few_verdicts_is_rejected(tmp_path):
    with pytest.raises(InputError, match="1 verdicts for 2"):
        made(tmp_path, [Q], samples(Q, "a", "bb"), judge=lambda groups: [(Verdict(1.0),) for _ in groups])


def test_the_report_correlates_length_and_reward(tmp_path):
    given = [*samples(Q, "a", "bb", "cccc"), *samples(R, "aaaaaaaa", "bb")]
    _, statistics = made(tmp_path, [Q, R], given)
    report = statistics.report()
    assert report["longer_wins"] == 1
    assert report["length_correlation"] == pytest.approx(1)
    assert report["gap_mean"] == (3 + 6) / 2
    assert report["reward_mean"] == (1 + 2 + 4 + 8 + 2) / 5


def test_a_judge_of_short_responses_has_negative_correlation(tmp_path):
    def short(groups):
        return [tuple(Verdict(-float(len(text))) for text in responses) for _, responses in groups]

    report = made(tmp_path, [Q], samples(Q, "a", "bb", "cc"), judge=short)[1].report()
    assert report["longer_wins"] == 0
    assert report["counts"]["pairs:tied"] == 1


def test_pass_rates_are_of_all_samples_and_also_of_prompts_whose_groups_are_dropped(tmp_path):
    def right(groups):
        return [tuple(Verdict(float("yes" in text)) for text in responses) for _, responses in groups]

    third, fourth = prompt("T", key=3), prompt("U", key=4)
    given = [
        *samples(Q, "yes", "yes", "no", "well"),  # half, with a duplicate
        *samples(R, "no", "well"),  # a tie
        *samples(third, "yes", "oh yes"),  # a tie
        *samples(fourth, "no", "never", "yes", "well"),  # a quarter
    ]
    groups, statistics = made(tmp_path, [Q, R, third, fourth], given, judge=right)
    report = statistics.report()
    assert len(groups) == 2
    assert report["pass_rate_mean"] == pytest.approx((1 / 2 + 0 + 1 + 1 / 4) / 4)
    assert (report["never_passed"], report["always_passed"]) == (1 / 4, 1 / 4)


def test_rewards_that_are_no_verdicts_have_no_pass_rate(tmp_path):
    report = made(tmp_path, [Q], samples(Q, "a", "bb"))[1].report()
    assert "pass_rate_mean" not in report


def test_the_pass_rate_counts_responses_at_the_threshold():
    assert pass_rate([1.0, 0.99, 0.0, 2.0]) == 0.5
    assert pass_rate([3.0, 4.0], threshold=3.5) == 0.5


def test_the_report_of_no_groups_has_no_values():
    assert GroupStatistics().report()["reward_mean"] is None


def test_unjudged_responses_have_no_reward():
    statistics = GroupStatistics()
    (group,) = unscored_comparisons([Q], samples(Q, "a", "bb", ""), statistics)
    assert texts(group) == ["a", "bb"]
    assert {response.reward for response in group.responses} == {None}
    assert statistics.counts["responses:left out, empty"] == 1


def test_every_kind_of_record_has_a_prompt():
    said = (Message("user", "How many?"), Message("assistant", "So it is\n#### 1,200"))
    assert prompt_of(Q) is Q
    assert prompt_of(Comparison(Q.messages, (Response("a"),), metadata={"x": 1})) == prompt("Q", x=1)
    asked = prompt_of(Demonstration((*said, Message("user", "Thanks"), Message("assistant", "Welcome")), {"y": 2}))
    assert asked.messages == (*said, Message("user", "Thanks"))
    assert prompt_of(Demonstration(said)).messages == said[:1]


def test_a_number_in_a_chat_is_not_an_answer():
    said = (Message("user", "When?"), Message("assistant", "Perhaps in 1984."))
    assert "answer" not in prompt_of(Demonstration(said)).metadata


def test_the_final_answer_of_a_demonstration_is_stored():
    said = (Message("user", "How many?"), Message("assistant", "So it is\n#### 72"))
    assert prompt_of(Demonstration(said)).metadata["answer"] == "72"
    assert prompt_of(Demonstration(said, {"answer": "own"})).metadata["answer"] == "own"
