"""What is measured beside the metrics: loops, lengths and refusals of responses; calibration of decisions."""

import math
import random

import pytest

from align.evaluation.measures.calibration import calibration_error, confidence
from align.evaluation.measures.response_measures import ends_in_loop, measure_parts
from align.evaluation.tasks import TASKS
from align.rewards.thoughts import ThoughtSettings


@pytest.mark.parametrize("unit", ["a", "so ", "and it is blue. ", "One line of text.\n", "x" * 299 + "y"])
@pytest.mark.parametrize("cut", [0, 3])
def test_a_loop_at_the_end_is_found(unit, cut):
    text = "It begins as usual. " + unit * max(5, 80 // len(unit))
    assert ends_in_loop(text[: len(text) - cut])


@pytest.mark.parametrize(
    "text",
    ["", "no", "ha ha ha ha", "It is red, red, red and red.", "a" * 60 + " and then it goes on.", "| 1 | 2 |\n" * 3],
)
def test_ordinary_texts_end_in_no_loop(text):
    assert not ends_in_loop(text)


def test_random_words_end_in_no_loop():
    rng = random.Random(0)
    texts = [" ".join(rng.choice(["red", "blue", "sky", "sea"]) for _ in range(200)) for _ in range(50)]
    assert not any(map(ends_in_loop, texts))


def test_measures_count_over_all_responses_of_a_row():
    parts = measure_parts(["I'm sorry, but I can't help with that.", "la " * 30, "Yes."])
    assert parts == {"repetition": (1, 3), "length": (38 + 90 + 4, 3), "refusals": (1, 3)}


def test_a_refusal_is_one_of_the_answer_and_not_of_the_thoughts_before_it():
    thought = "<think>I can't recall it; I am not able to look it up. Well, it is 4.</think>"
    parts = measure_parts([f"{thought}It is 4.", f"{thought}I'm sorry, but I can't say."])
    assert parts["refusals"] == (1, 2)
    marked = ThoughtSettings(start="<r>", end="</r>")
    assert measure_parts(["<r>I'm sorry, I can't.</r>Yes."], marked)["refusals"] == (0, 1)


def test_confidence_is_that_of_the_likelier_side():
    assert confidence(math.log(3)) == pytest.approx(0.75) == confidence(-math.log(3))


def test_calibrated_decisions_have_little_error_and_overconfident_ones_the_gap():
    rng = random.Random(1)
    sure = [0.5 + rng.random() / 2 for _ in range(20_000)]
    right = [float(rng.random() < each) for each in sure]
    assert calibration_error(sure, right).value < 0.02
    found = calibration_error([0.95] * 1000, [1.0, 0.0] * 500)
    assert found.value == pytest.approx(0.45)
    assert found.low < found.value < found.high


def test_measures_are_no_columns_unless_asked_for():
    gsm8k, preference = TASKS["gsm8k"], TASKS["preference"]
    assert gsm8k.selected(None, 1) == ["correct"]
    assert gsm8k.selected(["length", "correct"], 1) == ["correct", "length"]
    assert preference.selected(["chosen_logp"], 1) == ["chosen_logp"]
    assert len(preference.selected(None, 1)) == 2
