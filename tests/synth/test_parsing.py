"""The parsers of answers: honest forms are read whole, and nothing is invented."""

import json
from collections import Counter
from random import Random

import pytest
from scripted_teacher import DRESSED_FORMS, FAULTS, FORMS, NAME_FORMS, SENTENCE_FORMS, names, sentences

from align.synth.parsing.decisions import best_threshold, verdict, yes_no
from align.synth.parsing.lists import items, same
from align.synth.parsing.programs import program
from align.synth.parsing.scripts import script
from align.synth.parsing.turns import user_turn, without_politeness

TRIALS = 40


def trials(make):
    for seed in range(TRIALS):
        rng = Random(seed)
        yield make(rng.randint(2, 12), rng), rng


@pytest.mark.parametrize("form", [*FORMS, *DRESSED_FORMS, *NAME_FORMS])
def test_names_are_read_from_every_form(form):
    found = wanted = 0
    for true, rng in trials(names):
        parsed = items({**FORMS, **DRESSED_FORMS, **NAME_FORMS}[form](true, rng), len(true), finish="stop", names=True)
        assert set(parsed.items) <= set(true), (form, parsed)
        assert len(true) == len(parsed.items) + parsed.dropped.total()
        found, wanted = found + len(parsed.items), wanted + len(true)
    assert found >= 0.99 * wanted, (form, found, wanted)


@pytest.mark.parametrize("form", [*FORMS, *DRESSED_FORMS, *SENTENCE_FORMS])
def test_sentences_are_read_from_every_form(form):
    found = wanted = 0
    for true, rng in trials(sentences):
        parsed = items({**FORMS, **DRESSED_FORMS, **SENTENCE_FORMS}[form](true, rng), len(true), finish="stop")
        assert set(parsed.items) <= set(true), (form, parsed)
        assert len(true) == len(parsed.items) + parsed.dropped.total()
        found, wanted = found + len(parsed.items), wanted + len(true)
    assert found >= 0.99 * wanted, (form, found, wanted)


REASONS = {
    "fewer": {"too few"},
    "surplus": set(),
    "repeated": {"duplicate"},
    "cut": {"cut"},
    "cut json": {"cut", "too few"},
    "refusal": {"refused"},
    "empty": {"empty"},
    "blank": {"empty"},
    "endless": {"cut", "too long", "not a list"},
    "prose": {"not a list", "too long", "too few"},
}


@pytest.mark.parametrize("is_names", [True, False])
@pytest.mark.parametrize("fault", REASONS)
def test_faulty_answers_are_counted_by_reason_and_nothing_is_invented(fault, is_names):
    reasons = Counter()
    for true, rng in trials(names if is_names else sentences):
        text, finish = FAULTS[fault](true, rng)
        parsed = items(text, len(true), finish=finish, names=is_names)
        assert set(parsed.items) <= set(true), (fault, parsed)
        assert len(true) == len(parsed.items) + parsed.dropped.total()
        reasons += parsed.dropped
    assert reasons.keys() <= REASONS[fault], reasons
    assert reasons.keys() or not REASONS[fault]
    print(fault, dict(reasons))


def test_one_wanted_text_may_have_several_lines_and_lists_of_its_own():
    task = "Write a function that does two things:\n1. It sorts a list.\n2. It prints it."
    assert items(task, 1).items == (task,)
    assert items(f"Here is a task:\n\n{task}", 1).items == (task,)
    assert items("1. Sort a list.", 1).items == ("Sort a list.",)


def test_arrays_in_a_task_are_no_list_of_items():
    tasks = ['Given ["a", "b"], return ["b", "a"].', "Add up [1, 2, 3]."]
    assert items(f"1. {tasks[0]}\n2. {tasks[1]}", 2).items == tuple(tasks)


def test_known_items_are_duplicates_whatever_their_spelling():
    parsed = items("1. Linear  algebra!\n2. Optics\n3. optics", 3, names=True, known=["linear algebra"])
    assert parsed.items == ("Optics",)
    assert parsed.dropped == {"duplicate": 2}


YES = ["Yes", "yes, it is.", "**Yes**", '"Yes."', "Answer: Yes", "Final answer: **yes**", "YES!"]
NO = ["No", "no - it is not", "*No*.", "Answer is no.", "\n\nNo, that is a fruit."]
NEITHER = ["", "Maybe", "It is not possible to say yes.", "Nothing", "Yesterday"]


def test_only_an_answer_that_begins_with_yes_or_no_is_one():
    assert [yes_no(text) for text in [*YES, *NO, *NEITHER]] == [True] * len(YES) + [False] * len(NO) + [None] * len(
        NEITHER
    )


def test_the_last_mark_of_a_judge_counts():
    assert verdict("First I thought [[pass]], but no: [[fail]]") is False
    assert verdict("It is fine.\n\n**PASS**") is True
    assert verdict("It may pass or fail") is None
    assert verdict("") is None


def test_the_best_threshold_classifies_as_many_as_any_other():
    rng = Random(5)
    labels = [rng.random() < 0.5 for _ in range(60)]
    scores = [rng.gauss(1.5 if label else 0, 1) for label in labels]
    threshold = best_threshold(scores, labels)
    right = {
        at: sum((score > at) == label for score, label in zip(scores, labels, strict=True))
        for at in [*scores, -9, threshold]
    }
    assert right[threshold] == max(right.values())


def test_a_program_is_the_longest_fenced_block_or_the_code_after_prose():
    assert program("```python\nx = 1\n```\nand\n```python\ndef f():\n    return 2\n```") == "def f():\n    return 2"
    assert program("Here you are.\ndef f():\n    return 2") == "def f():\n    return 2"
    assert program("I would rather not.") is None


POLITE = {
    "Thank you so much for the answer! What is its mass?": "What is its mass?",
    "That's really helpful. And how far is it?": "And how far is it?",
    "Great explanation! I completely agree. Why is it red?": "Why is it red?",
    "Thanks, but what about Venus?": "but what about Venus?",
    "Interesting. Could you list three sources?": "Could you list three sources?",
    "Sure, I'd be happy to. My garden has clay soil.": "My garden has clay soil.",
    "Is that a good idea?": "Is that a good idea?",
    "That's not helpful. Try again.": "That's not helpful. Try again.",
    "I see a problem: it's clear only at night. Why?": "I see a problem: it's clear only at night. Why?",
    "How do I say thank you in Polish?": "How do I say thank you in Polish?",
}


def test_politeness_is_removed_and_the_request_stays():
    assert {text: without_politeness(text) for text in POLITE} == POLITE


TURNS = {
    'User: "How hot is it?"': ("How hot is it?", ""),
    "**Human:** How hot is it?": ("How hot is it?", ""),
    "How hot is it?\n\nAssistant: About 460 °C.": ("How hot is it?", ""),
    "Assistant: It is hot.": ("", "speaks as the assistant"),
    "As an AI, I have no body.": ("", "speaks as the assistant"),
    "How can I help you today?": ("", "speaks as the assistant"),
    "Thank you! That's great.": ("", "only polite"),
    "": ("", "empty"),
    "I'm sorry, but I can't continue this conversation.": ("", "refused"),
    "What is  VENUS": ("", "duplicate"),
}


def test_user_turns_are_cleaned_or_dropped_with_a_reason():
    assert {text: user_turn(text, ["What is Venus?"])[:2] for text in TURNS} == TURNS
    assert user_turn("And how big is", is_cut=True).reason == "cut"
    assert user_turn("Thanks! And how big is it?").was_polite


def test_texts_that_differ_in_case_and_marks_are_the_same():
    assert same("**Linear** Algebra.") == same("linear   algebra") != same("linear algebras")


@pytest.mark.parametrize("text", ["[" * 5000, '["a", ' + "[" * 100_000])
def test_deeply_nested_brackets_are_no_list(text):
    assert sum(items(text, 3).dropped.values()) + len(items(text, 3).items) == 3


def test_the_table_of_a_numbered_task_is_a_part_of_it():
    found = items("1. Add a row to this table:\n| a | b |\n|---|---|\n| 1 | 2 |\n2. Sort the rows.", 2).items
    assert found == ("Add a row to this table: | a | b | |---|---| | 1 | 2 |", "Sort the rows.")


def test_half_of_an_escaped_pair_becomes_a_replacement_character():
    found = items(r'["tell me \ud83d about it", "say \ud83d\ude00"]', 2).items
    assert found == ("tell me \ufffd about it", "say \U0001f600")


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("What is 3 - 4?", "what is 3-4", True),
        ("What is 3 − 4?", "What is 3 - 4?", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("Is x * y even?", "Is x / y even?", False),
        ("Add -3.", "Add 3.", False),
        ("Weigh 1.5 kg.", "Weigh 15 kg.", False),
        ("Count 1,000 birds", "count 1000 birds!", True),
        ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?", False),
        ("Is a <= b?", "Is a < b?", False),
        ("Read f[0].", "Read f(0).", False),
        ("Write it in C.", "Write it in C#.", False),
        ("**Ask** a follow-up, please!", "ask a follow up please", True),
        ("Is it not safe?", "Is it safe?", False),
    ],
)
def test_texts_are_the_same_but_for_case_space_and_punctuation(one, other, are_same):
    assert (same(one) == same(other)) == are_same


BLANK = 20_000  # lines; in cubic or quadratic time they would take hours or minutes


@pytest.mark.parametrize("space", ["\n", " ", "\t\n"])
def test_runs_of_white_space_take_linear_time(space):
    gap = space * BLANK
    assert items(f"1. foo{gap}x", 2).items[0].startswith("foo")
    assert items(f"1. foo{gap}x\n2. bar: it{gap}is", 2, names=True).items[-1] in ("foo", "bar")
    assert items(f'Here:{gap}\n["one", "two"]{gap}', 2).items == ("one", "two")
    assert script(f"User: Hi.{gap}\nAssistant:{gap}Hello!{gap}") == [("Hi.", "Hello!")]


@pytest.mark.parametrize("opening", ["[", '{"items": [', '{\n\n  "items":\n\n  [', "\n\n\t[", 'List:\n{ "a b" : ['])
def test_arrays_are_found_with_and_without_white_space(opening):
    assert items(f'{opening}"one", "two"]', 2).items == ("one", "two")


def test_an_answer_without_speakers_is_no_dialogue():
    assert script("Here is something else.") == script("") == script("Usernames: none.") == []


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            [{"title": "Ode", "task": "Write an ode"}, {"title": "Memo", "task": "Write a memo"}],
            ("Write an ode", "Write a memo"),
        ),
        ([{"id": "1", "name": "Algebra"}, {"id": "2", "name": "Optics"}], ("Algebra", "Optics")),
        ([{"level": 1, "Question": "Who?"}, {"level": 2, "Question": "Why?"}], ("Who?", "Why?")),
        ([{"entry": "one", "n": 1}, {"entry": "two", "n": 2}], ("one", "two")),
        ([{"one": "a", "other": "b"}, {"one": "c", "other": "d"}], ()),
    ],
)
def test_the_text_of_a_json_object_is_that_of_its_known_key_or_its_only_text(entries, expected):
    for text in (json.dumps(entries), json.dumps({"topics": entries}), json.dumps(entries, indent=1)):
        assert items(text, 2).items == items(text, 2, names=True).items == expected


def test_objects_without_text_in_a_task_are_no_list_of_items():
    task = 'Sort these by a:\n[{"a": 2}, {"a": 1}]'
    assert items(task, 1).items == (task,)
