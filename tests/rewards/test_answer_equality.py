"""Which answers are the same: pairs by hand (`answer_pairs.txt`, `final_answers.txt`), published and random ones."""

import json
import random
from pathlib import Path

import pytest

from align.rewards.answers.comparison import same_answer
from align.rewards.answers.extraction import final_answer

HERE = Path(__file__).parent
CASES = HERE.parents[1] / ".." / "shared" / "cases"

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TEENS = {13: "thirteen", 15: "fifteen", 18: "eighteen"}
TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety"}
SPELLINGS = [  # of one unit; units of two rows differ
    ["cm", "centimeters", "centimetre", r"\text{ cm}", r"\mathrm{~cm}"],
    ["cm^2", "cm²", "square centimeters", "sq cm", r"\text{ cm}^2"],
    ["cm^3", "cm³", "cubic centimeters", r"\text{ cm}^3"],
    ["m", "meters", "metre", r"\text{ m}"],
    ["km/h", "kilometers per hour", "kph", "km / h"],
    ["mph", "miles per hour", "mi/h"],
    ["hours", "hour", "hrs", "h"],
    ["minutes", "minute", "min", "mins"],
    ["feet", "foot", "ft"],
    ["inches", "inch", "in."],
    ["kg", "kilograms", "kilogram"],
    ["dollars", "dollar", "USD", "US dollars"],
    ["euros", "euro", "EUR", "€"],
    ["pounds sterling", "GBP"],
    ["cents", "cent", "¢"],
    ["apples", "apple"],
    ["cherries", "cherry"],
    ["boxes", "box"],
    ["°C", "degrees Celsius"],
    ["°F", "degrees Fahrenheit"],
]


def read_pairs(name):
    """Return (first, second, whether they are the same) of a file of pairs."""
    found, same = [], None
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            same = same is None
            continue
        first, second = line.rsplit(" | ", 1)
        found.append((first, second, same))
    return found


def spelled(number):
    if number < len(ONES):
        return ONES[number]
    if number < 20:
        return TEENS.get(number, ONES[number - 10] + "teen")
    return TENS[number - number % 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def test_pairs_are_judged_as_by_hand_in_both_directions():
    pairs = read_pairs("answer_pairs.txt")
    wrong = [pair for *pair, same in pairs if {same_answer(*pair), same_answer(*reversed(pair))} != {same}]
    assert wrong == []
    assert sum(same for *_, same in pairs) > 300 < sum(not same for *_, same in pairs) + 50


def test_an_answer_is_itself():
    texts = {text for *pair, _ in read_pairs("answer_pairs.txt") for text in pair}
    assert [text for text in texts if not same_answer(text, text)] == []


def test_final_answers_are_found_as_by_hand():
    found = [
        (response, answer, same, final_answer(response.replace(r"\n", "\n")))
        for response, answer, same in read_pairs("final_answers.txt")
    ]
    assert [each for each in found if (each[3] is not None and same_answer(each[3], each[1])) != each[2]] == []
    assert len(found) > 180


@pytest.mark.parametrize("name", ["answer_pairs.jsonl", "final_answers.jsonl"])
def test_the_published_cases_are_judged_right(name):
    if not (CASES / name).is_file():
        pytest.skip(f"the cases are not at {CASES}")
    rows = [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]
    wrong = []
    for row in rows:
        if "response" in row:
            given, expected, right = (
                final_answer(row["response"].rpartition("</think>")[2]),
                row["answer"],
                row["correct"],
            )
        else:
            given, expected, right = row["answer"], row["reference"], row["equal"]
        if (given is not None and same_answer(given, expected)) != right:
            wrong.append(row)
    assert wrong == []
    print(f"covered {len(rows)} cases")


def test_numbers_of_json_are_answers():
    assert same_answer(42, "42.0")
    assert same_answer("0.0000001", 1e-7)
    assert same_answer("1e22", 1e22)
    assert not same_answer(4.2, 42)


def test_spellings_of_random_quantities_are_equal_and_other_numbers_and_units_are_not():
    draw = random.Random(0)
    for _ in range(400):
        number = draw.randrange(2, 100)
        row = draw.randrange(len(SPELLINGS))
        forms = [
            f"{number}",
            f"{number}.00",
            f"${number}$",
            spelled(number),
            f"{10 * number}e-1",
            rf"\boxed{{{number}}}",
        ]
        one, two = (f"{draw.choice(forms[:2])} {draw.choice(SPELLINGS[row])}" for _ in range(2))
        assert same_answer(one, two), (one, two)
        assert same_answer(draw.choice(forms), draw.choice(forms)), forms
        assert same_answer(one, draw.choice(forms)), (one, number)
        assert same_answer(f"{spelled(number)} {SPELLINGS[row][0]}", two), (number, two)
        other = draw.choice([number + 1, number * 10, number * 100, -number, number + 0.5])
        changed = f"{other} {draw.choice(SPELLINGS[row])}"
        assert not same_answer(one, changed), (one, changed)
        others = draw.choice([names for names in SPELLINGS if names is not SPELLINGS[row]])
        converted = f"{number} {draw.choice(others)}"
        assert not same_answer(one, converted), (one, converted)


def test_words_with_their_letters_in_another_order_are_different():
    draw = random.Random(1)
    for _ in range(500):
        letters = [draw.choice("abcdefghijklmnoprstuw") for _ in range(draw.randrange(2, 9))]
        word, shuffled = "".join(letters), "".join(draw.sample(letters, len(letters)))
        for one, two in ((word, shuffled), (word.title(), shuffled.title()), (f"{word} 12", f"{shuffled} 12")):
            assert same_answer(one, two) == (word == shuffled), (one, two)


def test_numerals_of_other_bases_and_negated_answers_are_different():
    draw = random.Random(2)
    for _ in range(300):
        base = draw.randrange(2, 10)
        digits = "".join(str(draw.randrange(base)) for _ in range(draw.randrange(2, 6))).lstrip("0") or "1"
        other = draw.choice([each for each in range(2, 17) if each != base])
        assert same_answer(f"{digits}_{base}", f"{digits}_{{{base}}}")
        assert not same_answer(f"{digits}_{base}", f"{digits}_{other}"), (digits, base, other)
        assert not same_answer(f"{digits}_{base}", digits), (digits, base)
        value = draw.choice([f"{draw.randrange(1, 999)}", "x", r"\sqrt{2}", r"\frac{1}{3}", "3.5 cm", "$20", "50%"])
        for negation in (f"-{value}", f"not {value}", f"- {value}"):
            assert not same_answer(negation, value), negation


@pytest.mark.parametrize(
    "text", ["(" * 500, "(" * 400 + "1" + ")" * 400, "A. " * 300, "(A) " * 240, "1," * 480 + "1", "x=" * 400]
)
def test_a_deeply_nested_answer_is_compared_in_time(text):
    assert not same_answer(text, "5")
    assert not same_answer("5", text)
    assert same_answer(text, text)
