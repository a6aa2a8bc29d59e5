"""Features of a prompt's task: pairs of similar prompts that are the same task, and pairs that are not."""

import random

import pytest

from align.rewards.verifiers.same_task import difference, task_features

OTHER_TASKS = {
    "numbers": [
        ("A train covers 120 km in 2 hours. How fast is it?", "A train covers 150 km in 2 hours. How fast is it?"),
        ("Give three reasons to exercise.", "Give four reasons to exercise."),
        ("What is 8 minus 3?", "What is 3 minus 8?"),
        ("Name twenty-one rivers.", "Name twenty-two rivers."),
        ("He has $1,000.", "He has $1,000.50."),
    ],
    "operators": [
        ("Return the sum of two numbers.", "Return the product of two numbers."),
        ("Sort the list in ascending order.", "Sort the list in descending order."),
        ("Find the union of the sets.", "Find the intersection of the sets."),
    ],
    "expressions": [("Check that a < b.", "Check that a > b."), ("Solve x + y for x.", "Solve x * y for x.")],
    "negations": [
        ("Is it safe to mix bleach and ammonia?", "Is it not safe to mix bleach and ammonia?"),
        ("Is this step safe?", "Is this step unsafe?"),
        ("Foods with sugar", "Foods without sugar"),
        ("Why do cats purr?", "Why don't cats purr?"),
        ("Why do cats purr?", "Why don’t cats purr?"),
    ],
    "quantifiers": [
        ("Did all students pass?", "Did some students pass?"),
        ("Name the largest river.", "Name the smallest river."),
        ("She has twice as many.", "She has half as many."),
    ],
    "instructions": [
        ("Answer in all lowercase: how far is it?", "Answer in all capitals: how far is it?"),
        ("Describe the sea in a table.", "Describe the sea in JSON."),
        ('What does "sooner" mean?', 'What does "later" mean?'),
        ("Write about the sea.", "Write a poem about the sea."),
    ],
    "languages": [
        ("Write it in C++.", "Write it in C#."),
        ("Write it in C.", "Write it in Rust."),
        ("Write it in Java.", "Write it in JavaScript."),
        ("Translate it into French.", "Translate it into German."),
    ],
}
SAME_TASK = [
    ("Give three reasons to exercise.", "List 3 benefits of working out."),
    ("Add the two numbers.", "Compute the sum of these two numbers."),
    ("Tom has 3 pens. Ann has 8.", "Ann has 8. Tom has 3 pens."),
    ("List every prime.", "List all primes."),
    ("Name twenty-one rivers.", "Name 21 rivers."),
    ("Is it impossible to swim there?", "Is it not possible to swim there?"),
    ("Write it in Golang.", "Write it as a Go program."),
]


@pytest.mark.parametrize("feature", OTHER_TASKS)
def test_prompts_of_other_tasks_differ_in_the_feature(feature):
    for one, other in OTHER_TASKS[feature]:
        assert difference(task_features(one), task_features(other)) == feature, (one, other)
        assert difference(task_features(other), task_features(one)) == feature


@pytest.mark.parametrize(("one", "other"), SAME_TASK)
def test_rewordings_are_the_same_task(one, other):
    assert difference(task_features(one), task_features(other)) == ""


def test_case_and_white_space_decide_nothing_and_any_changed_number_does():
    draw = random.Random(1)
    for _ in range(100):
        numbers = [draw.randrange(2, 10_000) for _ in range(draw.randrange(1, 6))]
        text = " ".join(f"Item {'ABCDEF'[at]} costs {number:,} euros." for at, number in enumerate(numbers))
        assert task_features(text) == task_features(text.lower().replace(" ", "  "))
        at = draw.randrange(len(numbers))
        changed = text.replace(f"costs {numbers[at]:,} ", f"costs {numbers[at] + 1:,} ", 1)
        assert difference(task_features(text), task_features(changed)) == "numbers"
