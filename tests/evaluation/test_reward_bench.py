"""RewardBench and RewardBench 2 from rewards. Expectations follow the published weights and forms, computed by hand."""

import pytest

from align.evaluation.measures.reward_bench import SECTIONS, RatedRow, reward_bench, ties_score
from align.evaluation.statistics import stratified_score
from align.records import Comparison, Message, Response

ALL = {name for section in SECTIONS.values() for name in section}


def pairs(subset, *, won, of):
    """Pairs of which `won` are right, half of the others wrong and the rest of equal rewards."""
    lost = [RatedRow(subset, [0.0], [float(number % 2)]) for number in range(of - won)]
    return [RatedRow(subset, [1.0], [0.0])] * won + lost


def test_section_weights_are_the_published_ones():
    assert {section: sum(subsets.values()) for section, subsets in SECTIONS.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968
    }  # fmt: skip
    assert SECTIONS["Reasoning"]["math-prm"] == 984  # in place of its 447 pairs, which make 2,985 in all
    assert sum(sum(subsets.values()) for subsets in SECTIONS.values()) - 984 + 447 == 2985


def test_the_overall_score_of_nemotron_follows_from_its_sections():
    accuracies = {"alpacaeval-easy": 958, "llmbar-natural": 871, "donotanswer": 915, "hep-go": 937}
    found = reward_bench([row for name, won in accuracies.items() for row in pairs(name, won=won, of=1000)])
    assert [each["value"] for each in found["sections"].values()] == pytest.approx([0.958, 0.871, 0.915, 0.937])
    assert round(100 * found["overall"]["value"], 1) == 92.0  # Adler et al. 2024, table 4: without Prior Sets
    assert set(found["missing"]) == ALL - accuracies.keys()


def test_mathematics_weighs_as_much_as_all_code():
    code = [row for name in SECTIONS["Reasoning"] if name != "math-prm" for row in pairs(name, won=0, of=3)]
    found = reward_bench(pairs("math-prm", won=5, of=5) + code)
    assert found["sections"]["Reasoning"]["value"] == pytest.approx(0.5)
    assert found["overall"] is None  # three sections have no row


def test_equal_rewards_lose():
    assert reward_bench([RatedRow("hep-go", [2.0], [2.0])])["subsets"]["hep-go"]["value"] == 0


def test_rows_of_other_data_have_no_such_scores():
    def row(**metadata):
        pair = Comparison((Message("user", "ask"),), (Response("a"), Response("b")), 0, metadata)
        return RatedRow.of(pair, [1.0, 0.0])

    assert row() is row(subset="own") is row(subset="Math") is None
    assert row(subset="Math", num_correct=1, id="7") == RatedRow("Math", [1.0], [0.0], "7")
    assert row(subset="hep-go") == RatedRow("hep-go", [1.0], [0.0])
    assert reward_bench([]) == {}


def test_one_of_four_shares_the_first_place():
    rows = [RatedRow("Math", [1.0], [0.0, 1.0, 0.5]), RatedRow("Math", [1.0], [2.0, 0.0, 0.0])]
    found = reward_bench(rows)
    assert found["benchmark"] == "RewardBench 2"
    assert found["subsets"]["Math"]["value"] == (1 / 2 + 0) / 2
    assert found["overall"] is None


def test_ties_ask_for_right_answers_close_to_each_other():
    # All right above all wrong, and spread 1 < gaps 3 and 2: accuracies 0.6, margins 0.4, ratio tanh(2 / 1 - 1)
    both = [RatedRow("Ties", [4.0], [1.0], "ref:1"), RatedRow("Ties", [4.0, 3.0], [1.0], "tied:1")]
    assert ties_score(both).value == pytest.approx(1 + 0.01 * 0.7615941559557649)
    # Spread 2.5 exceeds the gap of the several right answers, so neither comparison of margins holds
    wide = [both[0], RatedRow("Ties", [4.0, 1.5], [1.0], "tied:1")]
    assert ties_score(wide).value == pytest.approx(0.6 + 0.01 * -0.6640367702678489)  # tanh(0.5 / 2.5 - 1)


def test_a_prompt_of_ties_that_a_limit_has_cut_in_two_is_counted():
    one = RatedRow("Ties", [4.0], [1.0], "ref:1")
    found = reward_bench([one])
    assert "Ties" in found["missing"] and "Ties" not in found["subsets"]  # not 0 in all that compares both forms
    assert found["ties_unpaired"] == 1
    both = [one, RatedRow("Ties", [4.0, 3.0], [1.0], "tied:1")]
    found = reward_bench([*both, RatedRow("Ties", [1.0], [2.0], "ref:2")])
    assert found["ties_unpaired"] == 1
    # Of the accuracies with one right answer, half are lost
    assert found["subsets"]["Ties"]["value"] == pytest.approx(ties_score(both).value - 0.3 / 2)


def test_a_stratified_interval_leaves_out_differences_between_strata():
    values = {"easy": [1.0] * 50, "hard": [0.0] * 50}
    assert stratified_score(values)[:3] == (0.5, 0.5, 0.5)
    mixed = stratified_score({"one": [0.0, 1.0] * 100, "other": [1.0]}, {"one": 3, "other": 1})
    assert mixed.value == pytest.approx((3 * 0.5 + 1) / 4)
    standard_error = 3 / 4 * (0.25 / 200) ** 0.5
    assert mixed.high - mixed.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
