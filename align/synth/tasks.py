"""Procedural tasks: instructions that a program makes and a program can check. They are the quickstart's data.

A row depends on its (kind, purpose, seed, split, index) alone; its metadata is enough to grade a response to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from random import Random
from typing import Any, NamedTuple

from align.config import InputError, pick
from align.records import Comparison, Demonstration, Message, Prompt, Response

Facts = Mapping[str, Any]  # what a row asks for, in plain values; it travels as the row's metadata

SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}  # tenths of all that can be asked
DRAWS = 4  # instructions drawn for each different one, at most
MOST_RESPONSES = 6  # the task with the fewest ways to be answered well or badly has six

# General: list, repeat or count words under one to three constraints.

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


def _draw_general(rng: Random) -> Facts:
    """What a new instruction asks for; the constraints are (name, value) in the order of the wording."""
    task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
    topic, count = rng.choice(list(TOPICS)), rng.choice(COUNTS)
    subjects = {"list": [topic], "repeat": TOPICS[topic], "count": NUMBERS[: len(NUMBERS) - max(COUNTS)]}
    values = {"capitals": [""], "separator": list(SEPARATORS), "ending": list(MARKS)}
    if task == "list":
        values |= {"order": [""], "without": TOPICS[topic]}
    constraints = [[name, rng.choice(values[name])] for name in rng.sample(list(values), rng.randint(1, 3))]
    return {"task": task, "subject": rng.choice(subjects[task]), "count": count, "constraints": constraints}


def _say_general(facts: Facts) -> str:
    """The instruction in words."""
    opening = OPENINGS[facts["task"]].format(count=NUMBERS[facts["count"] - 1], subject=facts["subject"])
    return ", ".join([opening, *(CONSTRAINTS[name].format(value) for name, value in facts["constraints"])]) + "."


def _answer_general(facts: Facts, rng: Random) -> str:
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


def _check_general(facts: Facts, response: str) -> tuple[bool, ...]:
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


def _general_texts() -> Iterator[str]:
    """Every word that an answer can hold, in lower and upper case, first and later in a text; then every wording."""
    for word in (*NUMBERS, *(word for circle in TOPICS.values() for word in circle)):
        yield from (word, f" {word}", word.upper(), f" {word.upper()}")
    yield from (f"cat {sign} cat, cat{sign}" for sign in (*SEPARATORS.values(), *MARKS.values()))
    yield from (opening.format(count="three", subject=topic) for opening in OPENINGS.values() for topic in TOPICS)
    yield from (f", {wish.format(value)}." for wish in CONSTRAINTS.values() for value in (*SEPARATORS, *MARKS))


# Code: keep some numbers of a list, change them once or twice, return something. Graded by running it, so not here.

DIGITS = range(1, 10)
KEEP: dict[str, tuple[str, Callable[[int], bool]]] = {  # what is asked -> its source, and what it means
    "keep the odd numbers": ("v % 2 == 1", lambda v: v % 2 == 1),
    "keep the even numbers": ("v % 2 == 0", lambda v: v % 2 == 0),
    **{f"keep the numbers above {n}": (f"v > {n}", lambda v, n=n: v > n) for n in DIGITS},
    **{f"keep the numbers below {n}": (f"v < {n}", lambda v, n=n: v < n) for n in DIGITS},
}
CHANGE: dict[str, tuple[str, Callable[[int], int]]] = {
    **{f"add {n} to each": (f"{{}} + {n}", lambda v, n=n: v + n) for n in DIGITS},
    **{f"multiply each by {n}": (f"{{}} * {n}", lambda v, n=n: v * n) for n in DIGITS},
}
RETURN: dict[str, tuple[str, Callable[[list[int]], Any]]] = {
    "return the list": ("{}", list),
    "return the sum": ("sum({})", sum),
    "return the length": ("len({})", len),
    "return the largest or 0": ("max({}, default=0)", lambda values: max(values, default=0)),
}
INPUTS = ([3, 8, 1, 6], [7, -2, 4, 9, 5], [2, 10], [0, 3, 3, 12, -7], [1, 5, 11, 8, 6, 4], [])
BUGS = 0.08  # share of answers in which one step of the program is another


def _draw_code(rng: Random) -> Facts:
    """The steps of a program, and what it makes of some inputs, as text."""
    changes = rng.choices(list(CHANGE), k=rng.randint(1, 2))
    steps = [rng.choice(list(KEEP)), *changes, rng.choice(list(RETURN))]
    return {"steps": steps, "examples": [[repr(values), repr(_result(steps, values))] for values in INPUTS]}


def _result(steps: list[str], values: list[int]) -> Any:  # noqa: ANN401 - a number or a list, as the last step says
    """What the steps make of a list of numbers."""
    keep, *changes, last = steps
    values = [value for value in values if KEEP[keep][1](value)]
    for change in changes:
        values = [CHANGE[change][1](value) for value in values]
    return RETURN[last][1](values)


def _program(steps: list[str]) -> str:
    """The steps in Python."""
    keep, *changes, last = steps
    value = "v"
    for change in changes:
        value = CHANGE[change][0].format(value if value == "v" else f"({value})")
    return "lambda x: " + RETURN[last][0].format(f"[{value} for v in x if {KEEP[keep][0]}]")


def _say_code(facts: Facts) -> str:
    return f"Write Python for a list x: {', '.join(facts['steps'])}."


def _answer_code(facts: Facts, rng: Random) -> str:
    steps = list(facts["steps"])
    if rng.random() < BUGS:
        table, index = rng.choice(((KEEP, 0), (CHANGE, 1), (RETURN, -1)))
        steps[index] = rng.choice([step for step in table if step != steps[index]])
    return _program(steps)


def _code_texts() -> Iterator[str]:
    for keep in KEEP:
        for change in CHANGE:
            yield from (f"Write Python for a list x: {keep}, {change}.", _program([keep, change, "return the list"]))
    yield from (f", {last}. {source.format('')}" for last, (source, _) in RETURN.items())


class Kind(NamedTuple):
    """How instructions of one kind are made and answered."""

    draw: Callable[[Random], Facts]
    say: Callable[[Facts], str]
    answer: Callable[[Facts, Random], str]
    texts: Callable[[], Iterator[str]]


KINDS = {
    "general": Kind(_draw_general, _say_general, _answer_general, _general_texts),
    "code": Kind(_draw_code, _say_code, _answer_code, _code_texts),
}
CHECKS = {"general": _check_general}


def split_of(instruction: str) -> str:
    """The split of an instruction and of all its reorderings: it depends on the sorted words alone."""
    words = " ".join(sorted(re.findall(r"\w+", instruction)))
    tenth = int.from_bytes(hashlib.sha256(words.encode()).digest()) % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


class _Row(NamedTuple):
    facts: Facts
    prompt: tuple[Message, ...]
    answer: Callable[[], str]  # another one at each call


def _rows(kind: str, purpose: str, *, num_rows: int, seed: int, split: str) -> Iterator[_Row]:
    """Rows whose instructions were drawn until they fell into `split`."""
    pick(SPLITS, split, "split")
    makers = pick(KINDS, kind, "kind of task")
    for index in range(num_rows):
        place = repr((seed, kind, purpose, split, index))
        rng = Random(hashlib.sha256(place.encode()).digest())
        facts = makers.draw(rng)
        while split_of(makers.say(facts)) != split:
            facts = makers.draw(rng)
        prompt = (Message("user", makers.say(facts)),)
        facts = {"kind": kind, **facts, "origin": f"align.synth.tasks {place}"}
        yield _Row(facts, prompt, partial(makers.answer, facts, rng))


def prompts(kind: str, *, num_rows: int, seed: int, split: str) -> list[Prompt]:
    """Different instructions to be answered; their metadata is what `grade` needs."""
    found: dict[tuple[Message, ...], Facts] = {}
    for row in _rows(kind, "prompts", num_rows=DRAWS * num_rows, seed=seed, split=split):
        if len(found) == num_rows:
            break
        found.setdefault(row.prompt, row.facts)
    if len(found) < num_rows:
        raise InputError(f"num_rows is {num_rows}, and {split} gave only {len(found)} different {kind} prompts")
    return [Prompt(prompt, facts) for prompt, facts in found.items()]


def demonstrations(kind: str, *, num_rows: int, seed: int, split: str = "train") -> list[Demonstration]:
    """Instructions with one answer each, deliberately imperfect."""
    rows = _rows(kind, "demonstrations", num_rows=num_rows, seed=seed, split=split)
    return [Demonstration((*row.prompt, Message("assistant", row.answer())), row.facts) for row in rows]


def comparisons(kind: str, *, num_rows: int, num_responses: int, seed: int, split: str = "train") -> list[Comparison]:
    """Instructions with different answers in the demonstrations' manner and their rewards, two or more to a group."""
    if not 2 <= num_responses <= MOST_RESPONSES:
        raise InputError(f"num_responses is {num_responses}; it can be 2 to {MOST_RESPONSES}")
    rows = _rows(kind, "comparisons", num_rows=num_rows, seed=seed, split=split)
    return [Comparison(row.prompt, _responses(row, num_responses), metadata=row.facts) for row in rows]


def _responses(row: _Row, num_responses: int) -> tuple[Response, ...]:
    found: dict[str, Response] = {}
    while len(found) < num_responses:
        answer = row.answer()
        response = Response(answer, reward(grade(row.facts, answer)))
        alike = {other.reward for other in found.values()} == {response.reward}
        if len(found) < num_responses - 1 or not alike:
            found[answer] = response
    return tuple(found.values())


def grade(metadata: Facts, response: str) -> tuple[bool, ...]:
    """One verdict a check, on a response to the prompt with this metadata; it passes when all of them hold."""
    return pick(CHECKS, str(metadata.get("kind")), "kind of task with a check")(metadata, response)


def reward(verdicts: tuple[bool, ...]) -> float:
    """Half the share of the checks that hold, and half if all of them do: 0 to 1."""
    return 0.5 * sum(verdicts) / len(verdicts) + 0.5 * all(verdicts)


def corpus() -> Iterator[str]:
    """Texts for the tokenizer, so that every word of every kind of task becomes one token."""
    yield from ("system", "user", "assistant")
    for kind in KINDS.values():
        yield from kind.texts()
