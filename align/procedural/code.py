"""Code tasks: filter and transform a list of numbers, and return a result. Graded by running the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from align.errors import InputError
from align.sandbox.function_calls import Program, run_programs

Spec = Mapping[str, Any]  # what a row asks for, as JSON values; stored in the row's metadata

OPENING = "Write Python for a list x: "
DIGITS = range(1, 10)
# Step in words -> its Python source, and its meaning
KEEP: dict[str, tuple[str, Callable[[int], bool]]] = {
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
NUM_CHANGES = (1, 2)
INPUTS = ([3, 8, 1, 6], [7, -2, 4, 9, 5], [2, 10], [0, 3, 3, 12, -7], [1, 5, 11, 8, 6, 4], [])
BUG_RATE = 0.08  # share of answers in which one step is replaced by a wrong one


def draw(rng: Random) -> Spec:
    """Return the steps of a random program, with examples of inputs and outputs as Python literals."""
    changes = rng.choices(list(CHANGE), k=rng.randint(*NUM_CHANGES))
    return _spec([rng.choice(list(KEEP)), *changes, rng.choice(list(RETURN))])


def _spec(steps: list[str]) -> Spec:
    return {"steps": steps, "examples": [[repr(values), repr(_result(steps, values))] for values in INPUTS]}


def parse(text: str) -> Spec | None:
    """Return the specification of an instruction in words; None for a text that is no instruction of this task.

    >>> parse("Write Python for a list x: keep the odd numbers, add 2 to each, return the sum.")["examples"][2]
    ['[2, 10]', '0']
    """
    keep, *changes, last = text.removeprefix(OPENING).removesuffix(".").split(", ") if ", " in text else ("", "")
    is_known = keep in KEEP and last in RETURN and len(changes) in NUM_CHANGES and CHANGE.keys() >= {*changes}
    spec = _spec([keep, *changes, last]) if is_known else None
    return spec if spec is not None and instruction(spec) == text else None


def _result(steps: list[str], values: list[int]) -> Any:  # noqa: ANN401 - a number or a list, depending on the last step
    """Return the result of the steps for a list of numbers."""
    keep, *changes, last = steps
    values = [value for value in values if KEEP[keep][1](value)]
    for change in changes:
        values = [CHANGE[change][1](value) for value in values]
    return RETURN[last][1](values)


def _program(steps: list[str]) -> str:
    """Return the steps as Python source."""
    keep, *changes, last = steps
    value = "v"
    for change in changes:
        value = CHANGE[change][0].format(value if value == "v" else f"({value})")
    return "lambda x: " + RETURN[last][0].format(f"[{value} for v in x if {KEEP[keep][0]}]")


def instruction(spec: Spec) -> str:
    """Return the instruction in words."""
    return f"{OPENING}{', '.join(spec['steps'])}."


def answer(spec: Spec, rng: Random) -> str:
    """Return a program; with probability `BUG_RATE` one of its steps is wrong."""
    steps = list(spec["steps"])
    if rng.random() < BUG_RATE:
        table, index = rng.choice(((KEEP, 0), (CHANGE, 1), (RETURN, -1)))
        steps[index] = rng.choice([step for step in table if step != steps[index]])
    return _program(steps)


def vocabulary_texts() -> Iterator[str]:
    """Yield every step in words and in Python, for training a tokenizer."""
    for keep in KEEP:
        for change in CHANGE:
            yield from (f"Write Python for a list x: {keep}, {change}.", _program([keep, change, "return the list"]))
    yield from (f", {last}. {source.format('')}" for last, (source, _) in RETURN.items())


def check(rows: Sequence[tuple[Spec, str]]) -> list[tuple[bool, ...]]:
    """Return whether each example holds, for each (spec, response); distinct programs run once each, in sandboxes."""
    programs = [_program_with_inputs(spec, response) for spec, response in rows]
    outputs = run_programs(programs)
    return [
        tuple(output == expected for output, (_, expected) in zip(outputs[program], spec["examples"], strict=True))
        for program, (spec, _) in zip(programs, rows, strict=True)
    ]


def _program_with_inputs(spec: Spec, response: str) -> Program:
    if not spec.get("examples"):
        raise InputError("a code task needs `examples`: pairs of an argument and the expected result")
    return Program(f"f = {response}", tuple(argument for argument, _ in spec["examples"]))
