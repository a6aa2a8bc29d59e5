"""Code tasks: keep some numbers of a list, change them once or twice, return something. Graded by running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from align.errors import InputError
from align.sandbox.function_calls import Program, run_programs

Facts = Mapping[str, Any]  # what a row asks for, in plain values; it travels as the row's metadata

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


def draw(rng: Random) -> Facts:
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


def say(facts: Facts) -> str:
    """The instruction in words."""
    return f"Write Python for a list x: {', '.join(facts['steps'])}."


def answer(facts: Facts, rng: Random) -> str:
    """A program, of whose steps one is another with the probability `BUGS`."""
    steps = list(facts["steps"])
    if rng.random() < BUGS:
        table, index = rng.choice(((KEEP, 0), (CHANGE, 1), (RETURN, -1)))
        steps[index] = rng.choice([step for step in table if step != steps[index]])
    return _program(steps)


def texts() -> Iterator[str]:
    """Every step in words and in Python."""
    for keep in KEEP:
        for change in CHANGE:
            yield from (f"Write Python for a list x: {keep}, {change}.", _program([keep, change, "return the list"]))
    yield from (f", {last}. {source.format('')}" for last, (source, _) in RETURN.items())


def check(rows: Sequence[tuple[Facts, str]]) -> list[tuple[bool, ...]]:
    """Verdicts on each example of each (facts, response); the programs run in sandboxes, each different one once."""
    asked = [_called(facts, response) for facts, response in rows]
    found = run_programs(asked)
    return [
        tuple(answer == expected for answer, (_, expected) in zip(found[one], facts["examples"], strict=True))
        for one, (facts, _) in zip(asked, rows, strict=True)
    ]


def _called(facts: Facts, response: str) -> Program:
    if not facts.get("examples"):
        raise InputError("a code task has examples: pairs of an argument and the answer to it")
    return Program(f"f = {response}", tuple(given for given, _ in facts["examples"]))
