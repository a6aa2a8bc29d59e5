"""General tasks: list, repeat or count words under one to three constraints, all checked by a program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any

Spec = Mapping[str, Any]  # what a row asks for, as JSON values; stored in the row's metadata

SPEC = ("task", "subject", "count", "constraints")  # keys of a specification
OPENINGS = {
    "list": "List {count} {subject}",
    "repeat": "Repeat the word {subject} {count} times",
    "count": "Count {count} numbers from {subject}",
}
TASK_WEIGHTS = {"list": 5, "repeat": 2, "count": 2}
COUNTS = range(3, 7)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# Words of each topic, as a cycle from which answers take consecutive words; not in alphabetical order
TOPICS: dict[str, list[str]] = {
    "animals": ["cat", "dog", "bird", "wolf", "fish", "mouse", "lion", "bear", "horse"],
    "fruits": ["pear", "apple", "plum", "fig", "mango", "cherry", "peach", "grape", "lemon"],
    "colours": ["red", "blue", "white", "green", "black", "yellow", "pink", "grey", "brown"],
    "tools": ["saw", "hammer", "drill", "rope", "knife", "brush", "nail", "file", "ladder"],
}
MAX_CONSTRAINTS = 3
WORDS = [word for words in TOPICS.values() for word in words]
SEPARATORS = {"dashes": "-", "slashes": "/", "stars": "*"}
MARKS = {"an exclamation mark": "!", "a question mark": "?", "a full stop": "."}
CONSTRAINTS = {
    "capitals": "in capitals",
    "separator": "separated by {}",
    "ending": "ending with {}",
    "order": "in alphabetical order",
    "without": "without the word {}",
}
LIST_ONLY = {"order", "without"}
# Probability that an answer violates each requirement. A requirement violated more than half the time is also violated
# by greedy decoding after SFT, which leaves room for preference optimization; rarer errors average out.
ERROR_RATES = {"count": 0.05, "capitals": 0.15, "separator": 0.15, "without": 0.3, "ending": 0.6, "order": 0.6}


def draw(rng: Random) -> Spec:
    """Return a random specification; its constraints are (name, value) in the order of the instruction."""
    task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
    topic, count = rng.choice(list(TOPICS)), rng.choice(COUNTS)
    subjects = {"list": [topic], "repeat": TOPICS[topic], "count": NUMBERS[: len(NUMBERS) - max(COUNTS)]}
    values = {"capitals": [""], "separator": list(SEPARATORS), "ending": list(MARKS)}
    if task == "list":
        values |= {"order": [""], "without": TOPICS[topic]}
    constraints = [
        [name, rng.choice(values[name])] for name in rng.sample(list(values), rng.randint(1, MAX_CONSTRAINTS))
    ]
    return {"task": task, "subject": rng.choice(subjects[task]), "count": count, "constraints": constraints}


def instruction(spec: Spec) -> str:
    """Return the instruction in words."""
    opening = OPENINGS[spec["task"]].format(count=NUMBERS[spec["count"] - 1], subject=spec["subject"])
    return ", ".join([opening, *(CONSTRAINTS[name].format(value) for name, value in spec["constraints"])]) + "."


def parse(text: str) -> Spec | None:
    """Return the specification of an instruction in words; None for a text that is no instruction of this task.

    >>> parse("List three tools, ending with a full stop.")["constraints"]
    [['ending', 'a full stop']]
    """
    opening, *phrases = text.removesuffix(".").split(", ")
    constraints = [_constraints().get(phrase) for phrase in phrases]
    if opening not in _openings() or None in constraints:
        return None
    spec = {**_openings()[opening], "constraints": [list(each) for each in constraints if each is not None]}
    return spec if _can_be_drawn(spec) and instruction(spec) == text else None


@cache
def _openings() -> dict[str, Spec]:
    """Return task, subject and count by the opening of an instruction."""
    subjects = {
        "list": list(TOPICS),
        "repeat": sum(TOPICS.values(), []),
        "count": NUMBERS[: len(NUMBERS) - max(COUNTS)],
    }
    return {
        OPENINGS[task].format(count=NUMBERS[count - 1], subject=subject): {
            "task": task,
            "subject": subject,
            "count": count,
        }
        for task in OPENINGS
        for subject in subjects[task]
        for count in COUNTS
    }


@cache
def _constraints() -> dict[str, tuple[str, str]]:
    """Return the name and value of each constraint by its words."""
    values = {"separator": [*SEPARATORS], "ending": [*MARKS], "without": WORDS}
    return {
        phrase.format(value): (name, value) for name, phrase in CONSTRAINTS.items() for value in values.get(name, [""])
    }


@cache
def _phrases() -> dict[str, list[str]]:
    """Return the words of follow-ups by the requirement that they change."""
    phrases = {"count": [NUMBERS[count - 1] for count in COUNTS]}
    for phrase, (name, _) in _constraints().items():
        phrases.setdefault(name, []).append(phrase)
    return phrases


def _can_be_drawn(spec: Spec) -> bool:
    """Return whether `draw` may return a specification whose opening and constraints are known."""
    named = dict(spec["constraints"])
    is_list = spec["task"] == "list"
    if not 1 <= len(named) == len(spec["constraints"]) <= MAX_CONSTRAINTS or (LIST_ONLY & named.keys() and not is_list):
        return False
    return "without" not in named or named["without"] in TOPICS[spec["subject"]]


def draw_follow_up(spec: Spec, rng: Random) -> tuple[str, Spec]:
    """Return what a user says next to change one requirement, and the specification of the revised request."""
    while True:
        text = f"Now {rng.choice(_phrases()[rng.choice(list(_phrases()))])}."
        if (revised := revise(spec, text)) is not None:
            return text, revised


def revise(spec: Spec, text: str) -> Spec | None:
    """Return the specification of a request after a user's follow-up; None for a text that is no follow-up to it.

    >>> spec = {"task": "list", "subject": "tools", "count": 3, "constraints": [["order", ""]]}
    >>> revise(spec, "Now in capitals.")["constraints"], revise(spec, "Now three.")
    ([['order', ''], ['capitals', '']], None)
    """
    phrase = text.removeprefix("Now ").removesuffix(".")
    if phrase in NUMBERS:
        revised = {**spec, "count": NUMBERS.index(phrase) + 1}
    elif phrase in _constraints():
        constraints = dict([*spec["constraints"], _constraints()[phrase]])
        revised = {**spec, "constraints": [list(each) for each in constraints.items()]}
    else:
        return None
    can_be_asked = revised["count"] in COUNTS and _can_be_drawn(revised)
    return revised if text == f"Now {phrase}." and can_be_asked and revised != spec else None


def answer(spec: Spec, rng: Random) -> str:
    """Return an answer that violates each requirement with its probability in `ERROR_RATES`."""
    violated = {name for name, share in ERROR_RATES.items() if rng.random() < share}
    kept = {name: value for name, value in spec["constraints"] if name not in violated}
    count = spec["count"] + (rng.choice((-1, 1)) if "count" in violated else 0)
    separator = f" {SEPARATORS[kept['separator']]} " if "separator" in kept else ", "
    text = separator.join(_words(spec, count, kept, rng)) + MARKS.get(kept.get("ending", ""), "")
    return text.upper() if "capitals" in kept else text


def _words(spec: Spec, count: int, kept: Mapping[str, str], rng: Random) -> list[str]:
    """Return the words of an answer. A list starts at a random word of its cycle, or after the forbidden one."""
    if spec["task"] == "repeat":
        return [spec["subject"]] * count
    if spec["task"] == "count":
        return _numbers(spec["subject"], count)
    cycle = TOPICS[spec["subject"]]
    first = 1 + cycle.index(kept["without"]) if "without" in kept else rng.randrange(len(cycle))
    words = [word for word in cycle[first:] + cycle[:first] if word != kept.get("without")]
    if "order" not in kept:
        return words[:count]
    start = rng.randrange(len(words) - count + 1)
    return sorted(words)[start : start + count]


def _numbers(first: str, count: int) -> list[str]:
    start = NUMBERS.index(first)
    return NUMBERS[start : start + count]


def check(rows: Sequence[tuple[Spec, str]]) -> list[tuple[bool, ...]]:
    """Return the verdicts on each (spec, response)."""
    return [_verdicts(spec, response) for spec, response in rows]


def _verdicts(spec: Spec, response: str) -> tuple[bool, ...]:
    """Return the verdicts on the words, on their number, and on each constraint in the order of the instruction."""
    words = re.findall(r"[a-z]+", response.lower())
    constraints = dict(spec["constraints"])
    if not words:
        return (False,) * (2 + len(constraints))
    is_plain = re.fullmatch(r"[A-Za-z ,*/-]+[.!?]?", response) is not None
    body = response.rstrip("".join(MARKS.values()))
    pieces = body.lower().split(SEPARATORS.get(constraints.get("separator", ""), ","))
    verdicts = {
        "capitals": response == response.upper(),
        "separator": [piece.strip() for piece in pieces] == words,
        "ending": response[len(body) :] == MARKS.get(constraints.get("ending", "")),
        "order": words == sorted(words),
        "without": constraints.get("without") not in words,
    }
    return is_plain and _are_right(spec, words), len(words) == spec["count"], *(verdicts[name] for name in constraints)


def _are_right(spec: Spec, words: list[str]) -> bool:
    """Return whether the words, regardless of their number, are the requested ones."""
    if spec["task"] == "repeat":
        return set(words) == {spec["subject"]}
    if spec["task"] == "count":
        return words == _numbers(spec["subject"], len(words))
    return set(words) <= set(TOPICS[spec["subject"]]) and len(set(words)) == len(words)


def vocabulary_texts() -> Iterator[str]:
    """Yield each word of answers, in both cases, with and without a leading space, and each phrase of instructions."""
    for word in (*NUMBERS, *(word for cycle in TOPICS.values() for word in cycle)):
        yield from (word, f" {word}", word.upper(), f" {word.upper()}")
    yield from (f"cat {sign} cat, cat{sign}" for sign in (*SEPARATORS.values(), *MARKS.values()))
    yield from (opening.format(count="three", subject=topic) for opening in OPENINGS.values() for topic in TOPICS)
    yield from (f", {phrase.format(value)}." for phrase in CONSTRAINTS.values() for value in (*SEPARATORS, *MARKS))
