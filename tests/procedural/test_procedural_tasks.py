import json
import re
from collections import Counter
from itertools import combinations

import pytest
from sandbox_mark import needs_sandbox

from align.errors import InputError
from align.models.settings import PUBLISHED_WEIGHTS
from align.procedural.general import parse
from align.procedural.tasks import (
    KINDS,
    attributes,
    comparisons,
    corpus,
    demonstrations,
    grade,
    grade_all,
    prompts,
    reward,
    split_of,
)

SPLITS = ("train", "validation", "test")


def asked(row):
    return (row.messages if hasattr(row, "messages") else row.prompt)[0].content


def made(maker, kind, num_rows, seed=0, split="train"):
    if maker is comparisons:
        return comparisons(kind, num_rows=num_rows, num_responses=4, seed=seed, split=split)
    return maker(kind, num_rows=num_rows, seed=seed, split=split)


def general(task, subject, count, *constraints):
    return {"kind": "general", "task": task, "subject": subject, "count": count, "constraints": constraints}


ANIMALS = general("list", "animals", 3, ("capitals", ""), ("separator", "dashes"), ("without", "bird"))
ORDERED = general("list", "tools", 3, ("order", ""), ("ending", "a full stop"))
REPEAT = general("repeat", "fig", 3, ("separator", "stars"), ("ending", "a question mark"))
COUNT = general("count", "four", 3, ("capitals", ""))

GRADED = [  # verdicts by hand, in the order: words, their number, then the constraints as listed
    (ANIMALS, "CAT - DOG - WOLF", "yyyyy"),
    (ANIMALS, "CAT-WOLF-DOG", "yyyyy"),
    (ANIMALS, "CAT - DOG - WOLF!", "yyyyy"),  # no ending was asked for
    (ANIMALS, "cat - dog - wolf", "yynyy"),
    (ANIMALS, "CAT - DOG - Wolf", "yynyy"),
    (ANIMALS, "CAT, DOG, WOLF", "yyyny"),
    (ANIMALS, "CAT - DOG, WOLF", "yyyny"),
    (ANIMALS, "- CAT - DOG - WOLF", "yyyny"),
    (ANIMALS, "CAT - BIRD - WOLF", "yyyyn"),
    (ANIMALS, "CAT - DOG", "ynyyy"),
    (ANIMALS, "CAT - CAT - DOG", "nyyyy"),
    (ANIMALS, "CAT - DOG - SAW", "nyyyy"),
    (ANIMALS, "CAT - DOG - WOLF 7", "nyyny"),
    (ANIMALS, "", "nnnnn"),
    (ANIMALS, "...", "nnnnn"),
    (ORDERED, "brush, drill, file.", "yyyy"),
    (ORDERED, "brush, file, drill.", "yyny"),
    (ORDERED, "brush, drill, file", "yyyn"),
    (ORDERED, "brush, drill, file!", "yyyn"),
    (ORDERED, "brush, drill, file..", "nyyn"),
    (REPEAT, "fig * fig * fig?", "yyyy"),
    (REPEAT, "fig * fig * fig * fig?", "ynyy"),
    (REPEAT, "fig * fig * plum?", "nyyy"),
    (REPEAT, "fig, fig, fig?", "yyny"),
    (COUNT, "FOUR, FIVE, SIX", "yyy"),
    (COUNT, "FOUR, FIVE, SIX, SEVEN", "yny"),
    (COUNT, "FIVE, SIX, SEVEN", "nyy"),
    (COUNT, "six, five, four", "nyn"),
]


@pytest.mark.parametrize(("metadata", "response", "verdicts"), GRADED)
def test_verdicts_match_those_by_hand(metadata, response, verdicts):
    assert grade(metadata, response) == tuple(verdict == "y" for verdict in verdicts)


ODD_SUM = {"kind": "code", "examples": [["[3, 8, 1]", "8"], ["[2]", "0"], ["[]", "0"]]}  # keep the odd, add 2, sum
GRADED_CODE = [  # verdicts by hand, one an example
    ("lambda x: sum([v + 2 for v in x if v % 2 == 1])", "yyy"),
    ("lambda x: sum(v + 2 for v in x if v % 2)", "yyy"),
    ("lambda x: sum([v + 2 for v in x])", "nny"),
    ("lambda x: len([v + 2 for v in x if v % 2 == 1])", "nyy"),
    ("lambda x: max([v + 2 for v in x if v % 2 == 1])", "nnn"),  # 5; of nothing there is no largest
    ("lambda x: str(sum([v + 2 for v in x if v % 2 == 1]))", "nnn"),
    ("lambda x: float(sum([v + 2 for v in x if v % 2 == 1]))", "nnn"),
    ("lambda x: 0", "nyy"),
    ("lambda x: sum([v + 2 for v in x", "nnn"),
    ("List three animals", "nnn"),
    ("", "nnn"),
    ("print(8)", "nnn"),
    ("exit(0)", "nnn"),
]


@needs_sandbox
def test_programs_are_graded_by_their_results():
    rows = [(ODD_SUM, response) for response, _ in GRADED_CODE]
    expected = [tuple(verdict == "y" for verdict in verdicts) for _, verdicts in GRADED_CODE]
    assert grade_all(rows) == expected
    assert grade(*rows[2]) == expected[2]


@needs_sandbox
def test_grading_together_equals_grading_one_by_one():
    rows = [
        row for pair in zip(*(demonstrations(kind, num_rows=8, seed=0) for kind in KINDS), strict=True) for row in pair
    ]
    asked_and_said = [(row.metadata, row.messages[1].content) for row in [*rows, *rows[:5]]]
    assert grade_all(asked_and_said) == [grade(*one) for one in asked_and_said]
    assert grade_all([]) == []


def test_attributes_match_their_formulas():
    # helpfulness 4 * reward, correctness 4 * 3/4, coherence 4 * 1/4 (one check holds before the first that fails),
    # complexity 3 different words / 2, verbosity 17 characters / 20
    verdicts, said = (True, False, True, True), "cat, Cat, dog, ox"
    assert attributes(verdicts, said) == pytest.approx(
        {"helpfulness": 1.5, "correctness": 3.0, "coherence": 1.0, "complexity": 1.5, "verbosity": 0.85}
    )
    assert attributes((True, True), "cat " * 40) == pytest.approx(
        {"helpfulness": 4.0, "correctness": 4.0, "coherence": 4.0, "complexity": 0.5, "verbosity": 4.0}
    )


def test_published_weights_agree_with_the_checks():
    groups = comparisons("general", num_rows=400, num_responses=4, seed=0)
    agree = [
        (one.reward > other.reward) == (published(one) > published(other))
        for group in groups
        for one, other in combinations(group.responses, 2)
        if one.reward != other.reward
    ]
    assert len(agree) > 1000
    assert sum(agree) / len(agree) > 0.97


def published(response):
    assert all(0 <= value <= 4 for value in response.attributes.values())
    return sum(PUBLISHED_WEIGHTS[name] * value for name, value in response.attributes.items())


@pytest.mark.parametrize(
    ("verdicts", "value"), [((True,) * 4, 1.0), ((True, True, True, False), 0.375), ((False,), 0.0)]
)
def test_the_reward_is_half_share_and_half_all(verdicts, value):
    assert reward(verdicts) == value


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_instruction_up_to_word_order(kind):
    bags = {
        split: {
            "".join(sorted(asked(row)))
            for maker in (prompts, demonstrations)
            for seed in (0, 1)
            for row in made(maker, kind, 150, seed, split)
        }
        for split in SPLITS
    }
    assert min(map(len, bags.values())) > 100, "too few different instructions to mean anything"
    assert len(set.union(*bags.values())) == sum(map(len, bags.values()))


def test_an_instruction_and_its_reordering_share_a_split():
    for row in prompts("general", num_rows=300, seed=0, split="train"):
        opening, *wishes = asked(row).removesuffix(".").split(", ")
        assert split_of(", ".join([opening, *reversed(wishes)]) + ".") == "train"


def test_a_program_and_its_steps_in_another_order_share_a_split():
    for split in SPLITS:
        for row in prompts("code", num_rows=300, seed=0, split=split):
            opening, steps = asked(row).removesuffix(".").split(": ")
            assert split_of(f"{opening}: {', '.join(reversed(steps.split(', ')))}.") == split


@pytest.mark.parametrize("maker", [prompts, demonstrations, comparisons])
@pytest.mark.parametrize("split", SPLITS)
def test_a_row_does_not_depend_on_the_number_of_rows(maker, split):
    rows = made(maker, "general", 40, split=split)
    assert made(maker, "general", 15, split=split) == rows[:15]
    assert all(split_of(asked(row)) == split for row in rows)
    others = made(maker, "general", 40, seed=1, split=split)
    assert sum(asked(row) == asked(other) for row, other in zip(rows, others, strict=True)) < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_prompts_are_distinct(kind, split):
    rows = prompts(kind, num_rows=300, seed=0, split=split)
    assert len({asked(row) for row in rows}) == 300


def test_the_first_row_is_the_same_on_every_machine():
    (row,) = demonstrations("general", num_rows=1, seed=0)
    assert [message.content for message in row.messages] == [
        "List four animals, in capitals, ending with a full stop.",
        "WOLF, FISH, MOUSE, LION",
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_an_instruction_is_parsed_to_what_it_was_written_from(split):
    for row in prompts("general", num_rows=300, seed=0, split=split):
        spec = {name: row.metadata[name] for name in ("task", "subject", "count", "constraints")}
        assert parse(asked(row)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "List three animals.",
        "List three animals, in capitals",
        "List three animals, in capitals, in capitals.",
        "List three planets, in capitals.",
        "List two animals, in capitals.",
        "List three animals, without the word saw.",
        "Count three numbers from one, in alphabetical order.",
        "List three animals, in capitals. Please.",
        "List three tools, in capitals, in alphabetical order, separated by stars, ending with a full stop.",
    ],
)
def test_other_texts_are_no_instructions(text):
    assert parse(text) is None


def failures(rows):
    """Share of demonstrations that fail each check, by its name."""
    asked_for, failed = Counter(), Counter()
    for row in rows:
        names = ["words", "count", *(name for name, _ in row.metadata["constraints"])]
        verdicts = grade(row.metadata, row.messages[1].content)
        asked_for.update(names)
        failed.update(name for name, holds in zip(names, verdicts, strict=True) if not holds)
    return {name: failed[name] / count for name, count in asked_for.items()}


def test_demonstrations_violate_requirements_at_the_error_rates():
    rows = demonstrations("general", num_rows=6000, seed=0)
    share = failures(rows)
    for name, published in {"words": 0, "count": 0.05, "capitals": 0.15, "separator": 0.15, "ending": 0.6}.items():
        assert share[name] == pytest.approx(published, abs=0.025), name
    assert 0.4 < share["order"] < 0.6  # forgotten 0.6, and a short run of the circle is in order by chance at times
    assert 0.1 < share["without"] < 0.2  # forgotten 0.3, and about half of what is then said holds the word
    passed = sum(all(grade(row.metadata, row.messages[1].content)) for row in rows) / len(rows)
    assert 0.40 < passed < 0.50


@pytest.mark.parametrize("num_responses", [2, 4, 6])
def test_a_group_has_distinct_responses_with_different_rewards(num_responses):
    groups = comparisons("general", num_rows=300, num_responses=num_responses, seed=3)
    assert len(groups) == 300
    for group in groups:
        contents = [response.content for response in group.responses]
        assert len(set(contents)) == len(contents) == num_responses
        assert len({response.reward for response in group.responses}) > 1
        for response in group.responses:
            verdicts = grade(group.metadata, response.content)
            assert (response.reward == 1) == all(verdicts)
            assert response.reward == pytest.approx(sum(verdicts) / len(verdicts) / 2 + all(verdicts) / 2)


def manner(text):
    """The style of a text: case, separator and ending."""
    return text.isupper(), frozenset(re.findall(r"\b\W+\b", text)), re.sub(r"\w", "", text[-1])


def test_comparisons_have_the_style_of_demonstrations():
    said = {manner(row.messages[1].content) for row in demonstrations("general", num_rows=3000, seed=0)}
    assert len(said) == 2 * 4 * 4  # capitals or not; a comma or one of three separators; no mark or one of three
    groups = comparisons("general", num_rows=300, num_responses=4, seed=0)
    assert {manner(response.content) for group in groups for response in group.responses} <= said


def test_grading_survives_writing_and_reading():
    for group in comparisons("general", num_rows=100, num_responses=3, seed=0, split="test"):
        again = json.loads(json.dumps(group.metadata))
        assert again == group.metadata
        assert all(grade(again, said.content) == grade(group.metadata, said.content) for said in group.responses)
        assert "comparisons" in again["origin"] and "'test'" in again["origin"]


def as_a_reader_would(instruction, values):
    """The result of a code instruction's English text for a list."""
    for step in instruction.removesuffix(".").split(": ")[1].split(", "):
        match step.split():
            case ["keep", "the", ("odd" | "even") as which, "numbers"]:
                values = [value for value in values if abs(value) % 2 == (which == "odd")]
            case ["keep", "the", "numbers", ("above" | "below") as side, number]:
                values = [value for value in values if (value - int(number)) * (1 if side == "above" else -1) > 0]
            case ["add", number, "to", "each"]:
                values = [value + int(number) for value in values]
            case ["multiply", "each", "by", number]:
                values = [value * int(number) for value in values]
            case ["return", "the", *what]:
                largest = sorted(values)[-1] if values else 0
                ends = {"list": values, "sum": sum(values), "length": len(values), "largest or 0": largest}
                return ends[" ".join(what)]


def test_examples_match_the_instruction():
    for row in prompts("code", num_rows=1000, seed=0, split="train"):
        for given, expected in row.metadata["examples"]:
            assert as_a_reader_would(asked(row), json.loads(given)) == json.loads(expected), asked(row)


def test_programs_pass_their_examples_except_for_planted_bugs():
    rows = demonstrations("code", num_rows=1500, seed=0)
    wrong = 0
    for row in rows:
        program = eval(row.messages[1].content)
        wrong += any(program(json.loads(given)) != json.loads(expected) for given, expected in row.metadata["examples"])
    assert 0.05 < wrong / len(rows) < 0.1  # 8 % have another step, and some of those do the same on every example


def test_the_corpus_contains_every_word_of_the_tasks():
    seen = {word for text in corpus() for word in text.replace(",", " ").replace(".", " ").split()}
    used = {
        word
        for row in demonstrations("general", num_rows=2000, seed=0)
        for message in row.messages
        for word in message.content.translate(str.maketrans(",.!?", "    ")).split()
    }
    assert used <= seen


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: prompts("generel", num_rows=1, seed=0, split="test"), "did you mean 'general'"),
        (
            lambda: prompts("general", num_rows=2500, seed=0, split="test"),
            "num_rows is 2500, but 10000 draws of split test contain only",
        ),
        (lambda: demonstrations("codes", num_rows=1, seed=0), "did you mean 'code'"),
        (lambda: prompts("general", num_rows=1, seed=0, split="valid"), "did you mean 'validation'"),
        (lambda: comparisons("general", num_rows=1, num_responses=7, seed=0), "num_responses is 7; it must be 2 to 6"),
        (lambda: comparisons("code", num_rows=1, num_responses=4, seed=0), "choose one of: general"),
        (lambda: grade({}, "cat"), "available: code, code_prompting, dialogues, general, prompting, user_turns"),
        (lambda: grade({"kind": "code"}, "cat"), "a code task needs `examples`"),
    ],
)
def test_invalid_arguments_are_rejected_with_the_valid_ones(call, says):
    with pytest.raises(InputError, match=says):
        call()
