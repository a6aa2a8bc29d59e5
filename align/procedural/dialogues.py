"""Dialogue tasks: a general instruction, and a follow-up of the user that changes one of its requirements.

The follow-up means nothing without what was said before it. The revised request is of the same split as the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from align.procedural import general
from align.procedural.splits import split_of

Spec = Mapping[str, Any]

instruction, answer = general.instruction, general.answer  # of the first turn


def draw(rng: Random) -> Spec:
    """Return the specification of the first request, the user's follow-up, and what it makes of the request."""
    while True:
        spec = general.draw(rng)
        text, revised = general.draw_follow_up(spec, rng)
        if split_of(instruction(spec)) == split_of(instruction(revised)):
            return {**spec, "follow_up": text, "revised": revised}


def later_turns(spec: Spec, rng: Random) -> tuple[str, str]:
    """Return the follow-up and its answer, which violates requirements as general answers do."""
    return spec["follow_up"], general.answer(spec["revised"], rng)


def check(rows: Sequence[tuple[Spec, str]]) -> list[tuple[bool, ...]]:
    """Return the verdicts on the answer to each follow-up."""
    return general.check([(spec["revised"], response) for spec, response in rows])
