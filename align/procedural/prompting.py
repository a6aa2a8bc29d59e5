"""Prompting tasks: write new instructions of the general task like a few that are shown, as in Self-Instruct.

They let a small model learn to be the teacher of a `synthesize` step. Instructions of the test split never occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from align.procedural import general
from align.procedural.splits import split_of

Spec = Mapping[str, Any]

WORDING = "Write {number} new instructions like these:\n{examples}"
SHOWN, NUMBER = 3, 2  # instructions shown and written


def draw(rng: Random) -> Spec:
    """Return the instructions to show."""
    return {"examples": [_instruction(rng) for _ in range(SHOWN)]}


def instruction(spec: Spec) -> str:
    """Return the request in words."""
    return WORDING.format(number=NUMBER, examples=listed(spec["examples"]))


def listed(examples: Sequence[str]) -> str:
    """Return the examples as lines of a list."""
    return "\n".join(f"- {each}" for each in examples)


def answer(spec: Spec, rng: Random) -> str:  # noqa: ARG001 - the same signature for every kind of task
    """Return other instructions, drawn as the shown ones, as a numbered list."""
    return "\n".join(f"{number}. {_instruction(rng)}" for number in range(1, NUMBER + 1))


def check(rows: Sequence[tuple[Spec, str]]) -> list[tuple[bool, ...]]:
    """Return the verdicts on each response: on its number of lines, on their form, and whether all are new."""
    return [_verdicts(spec, response.split("\n")) for spec, response in rows]


def _verdicts(spec: Spec, lines: Sequence[str]) -> tuple[bool, ...]:
    written = [line.removeprefix(f"{number}. ") for number, line in enumerate(lines, start=1)]
    return (
        len(lines) == NUMBER,
        all(general.parse(each) is not None for each in written),
        not {*written} & {*spec["examples"]} and len({*written}) == len(written),
    )


def _instruction(rng: Random) -> str:
    """Return an instruction of the training split."""
    while split_of(text := general.instruction(general.draw(rng))) != "train":
        pass
    return text
