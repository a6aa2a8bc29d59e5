"""General tasks: list, repeat or count words under one to three constraints that a program can check."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

Facts = Mapping[str, Any]  # what a row asks for, in plain values; it travels as the row's metadata

OPENINGS = {
    "list": "List {count} {subject}",
    "repeat": "Repeat the word {subject} {count} times",
    "count": "Count {count} numbers from {subject}",
}
TASK_WEIGHTS = {"list": 5, "repeat": 2, "count": 2}
COUNTS = range(3, 7)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TOPICS: dict[str, list[str]] = {  # each a circle that answers go round, not in the alphabet's order
    "animals": ["cat", "dog", "bird", "wolf", "fish", "mouse", "lion", "bear", "horse"],
    "fruits": ["pear", "apple", "plum", "fig", "mango", "cherry", "peach", "grape", "lemon"],
    "colours": ["red", "blue", "white", "green", "black", "yellow", "pink", "grey", "brown"],
    "tools": ["saw", "hammer", "drill", "rope", "knife", "brush", "nail", "file", "ladder"],
}
SEPARATORS = {"dashes": "-", "slashes": "/", "stars": "*"}
MARKS = {"an exclamation mark": "!", "a question mark": "?", "a full stop": "."}
CONSTRAINTS = {
    "capitals": "in capitals",
    "separator": "separated by {}",
    "ending": "ending with {}",
    "order": "in alphabetical order",
    "without": "without the word {}",
}
# How often an answer forgets it. What is forgotten more than half the time is also forgotten by greedy decoding
# after SFT, so that preferences have something to teach; rarer mistakes are ironed out by many demonstrations.
FORGETTING = {"count": 0.05, "capitals": 0.15, "separator": 0.15, "without": 0.3, "ending": 0.6, "order": 0.6}


def draw(rng: Random) -> Facts:
    """What a new instruction asks for; the constraints are (name, value) in the order of the wording."""
    task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
    topic, count = rng.choice(list(TOPICS)), rng.choice(COUNTS)
    subjects = {"list": [topic], "repeat": TOPICS[topic], "count": NUMBERS[: len(NUMBERS) - max(COUNTS)]}
    values = {"capitals": [""], "separator": list(SEPARATORS), "ending": list(MARKS)}
    if task == "list":
        values |= {"order": [""], "without": TOPICS[topic]}
    constraints = [[name, rng.choice(values[name])] for name in rng.sample(list(values), rng.randint(1, 3))]
    return {"task": task, "subject": rng.choice(subjects[task]), "count": count, "constraints": constraints}


def say(facts: Facts) -> str:
    """The instruction in words."""
    opening = OPENINGS[facts["task"]].format(count=NUMBERS[facts["count"] - 1], subject=facts["subject"])
    return ", ".join([opening, *(CONSTRAINTS[name].format(value) for name, value in facts["constraints"])]) + "."


def answer(facts: Facts, rng: Random) -> str:
    """An answer that forgets each thing asked for with its probability in `FORGETTING`."""
    forgotten = {name for name, share in FORGETTING.items() if rng.random() < share}
    kept = {name: value for name, value in facts["constraints"] if name not in forgotten}
    count = facts["count"] + (rng.choice((-1, 1)) if "count" in forgotten else 0)
    separator = f" {SEPARATORS[kept['separator']]} " if "separator" in kept else ", "
    text = separator.join(_words(facts, count, kept, rng)) + MARKS.get(kept.get("ending", ""), "")
    return text.upper() if "capitals" in kept else text


def _words(facts: Facts, count: int, kept: Mapping[str, str], rng: Random) -> list[str]:
    """The words of an answer. A list goes round its circle from a random word, or from the forbidden one on."""
    if facts["task"] == "repeat":
        return [facts["subject"]] * count
    if facts["task"] == "count":
        return _numbers(facts["subject"], count)
    circle = TOPICS[facts["subject"]]
    turn = 1 + circle.index(kept["without"]) if "without" in kept else rng.randrange(len(circle))
    line = [word for word in circle[turn:] + circle[:turn] if word != kept.get("without")]
    if "order" not in kept:
        return line[:count]
    start = rng.randrange(len(line) - count + 1)
    return sorted(line)[start : start + count]


def _numbers(first: str, count: int) -> list[str]:
    start = NUMBERS.index(first)
    return NUMBERS[start : start + count]


def check(rows: Sequence[tuple[Facts, str]]) -> list[tuple[bool, ...]]:
    """Verdicts on each (facts, response)."""
    return [_verdicts(facts, response) for facts, response in rows]


def _verdicts(facts: Facts, response: str) -> tuple[bool, ...]:
    """Verdicts on the words, on their number, and on each constraint in the order of the wording."""
    words, asked = re.findall(r"[a-z]+", response.lower()), dict(facts["constraints"])
    if not words:
        return (False,) * (2 + len(asked))
    plain = re.fullmatch(r"[A-Za-z ,*/-]+[.!?]?", response) is not None
    body = response.rstrip("".join(MARKS.values()))
    pieces = body.lower().split(SEPARATORS.get(asked.get("separator", ""), ","))
    verdicts = {
        "capitals": response == response.upper(),
        "separator": [piece.strip() for piece in pieces] == words,
        "ending": response[len(body) :] == MARKS.get(asked.get("ending", "")),
        "order": words == sorted(words),
        "without": asked.get("without") not in words,
    }
    return plain and _right(facts, words), len(words) == facts["count"], *(verdicts[name] for name in asked)


def _right(facts: Facts, words: list[str]) -> bool:
    """Whether these are words that were asked for, whatever their number."""
    if facts["task"] == "repeat":
        return set(words) == {facts["subject"]}
    if facts["task"] == "count":
        return words == _numbers(facts["subject"], len(words))
    return set(words) <= set(TOPICS[facts["subject"]]) and len(set(words)) == len(words)


def texts() -> Iterator[str]:
    """Every word that an answer can hold, in lower and upper case, first and later in a text; then every wording."""
    for word in (*NUMBERS, *(word for circle in TOPICS.values() for word in circle)):
        yield from (word, f" {word}", word.upper(), f" {word.upper()}")
    yield from (f"cat {sign} cat, cat{sign}" for sign in (*SEPARATORS.values(), *MARKS.values()))
    yield from (opening.format(count="three", subject=topic) for opening in OPENINGS.values() for topic in TOPICS)
    yield from (f", {wish.format(value)}." for wish in CONSTRAINTS.values() for value in (*SEPARATORS, *MARKS))
