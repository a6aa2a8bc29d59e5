"""User turns: write what the user says next in a dialogue of a general instruction and its answer.

They let a small model learn to play the user in a `synthesize` step. Requests of the test split never occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from align.procedural import general
from align.procedural.splits import split_of

Spec = Mapping[str, Any]

WORDING = "Write what the user says next:\n{history}"


def draw(rng: Random) -> Spec:
    """Return a request of the training split with an answer to it."""
    while True:
        spec = general.draw(rng)
        if split_of(general.instruction(spec)) == "train":
            return {"request": spec, "reply": general.answer(spec, rng)}


def instruction(spec: Spec) -> str:
    """Return the request in words, with the dialogue as the family `two_turn` writes it."""
    history = f"User: {general.instruction(spec['request'])}\n\nAssistant: {spec['reply']}"
    return WORDING.format(history=history)


def answer(spec: Spec, rng: Random) -> str:
    """Return a follow-up whose revised request is in the training split."""
    while True:
        text, revised = general.draw_follow_up(spec["request"], rng)
        if split_of(general.instruction(revised)) == "train":
            return text


def check(rows: Sequence[tuple[Spec, str]]) -> list[tuple[bool, ...]]:
    """Return whether each response is a follow-up to its request."""
    return [(general.revise(spec["request"], response) is not None,) for spec, response in rows]
