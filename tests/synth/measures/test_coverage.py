"""Coverage of topics: exact for even and for one-sided rows, and by the formula of entropy else."""

import math

import pytest

from align.synth.measures.coverage import topic_coverage, topic_yield

TOPICS = ["art", "law", "food", "war", "sea"]


def test_even_rows_cover_all_topics_and_rows_of_one_topic_one():
    assert topic_coverage(TOPICS, TOPICS * 3) == (1.0, pytest.approx(1.0))
    assert topic_coverage(TOPICS, ["art"] * 9) == (0.2, pytest.approx(0.0))


def test_evenness_is_the_entropy_divided_by_its_maximum():
    found = topic_coverage(TOPICS, ["art"] * 6 + ["law"] * 3 + ["sea"])
    bits = 0.6 * math.log2(1 / 0.6) + 0.3 * math.log2(1 / 0.3) + 0.1 * math.log2(10)
    assert found == (0.6, pytest.approx(bits / math.log2(5)))
    assert topic_coverage(TOPICS, ["art"] * 6 + ["law"] * 3 + ["sea"], at_least=3).covered == 0.4


def test_no_rows_cover_nothing_and_one_topic_has_no_evenness():
    assert topic_coverage(TOPICS, []) == (0.0, 0.0)
    assert topic_coverage(["art"], ["art"]) == (1.0, None)


def test_a_topic_outside_the_list_is_an_error():
    with pytest.raises(ValueError, match=r"not in the list: \['moon'\]"):
        topic_coverage(TOPICS, ["moon"])


def test_yields_start_with_the_topic_that_lost_the_most():
    found = topic_yield({"law": 4, "art": 4, "sea": 2, "war": 0}, ["law", "art", "art", "sea", "sea"])
    assert list(found.items()) == [("law", 0.25), ("art", 0.5), ("sea", 1.0)]
