"""Procedural tasks: instructions that a program makes and a program can check. They are the quickstart's data.

A row depends on its (kind, purpose, seed, split, index) alone; its metadata is enough to grade a response to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, NamedTuple

from align.errors import InputError
from align.procedural import code as code_tasks
from align.procedural import general as general_tasks
from align.records import Comparison, Demonstration, Message, Prompt, Response
from align.registry import pick

Facts = Mapping[str, Any]  # what a row asks for, in plain values; it travels as the row's metadata

SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}  # tenths of all that can be asked
DRAWS = 4  # instructions drawn for each different one, at most
MOST_RESPONSES = 6  # the task with the fewest ways to be answered well or badly has six
TOP = 4.0  # of an attribute, as in HelpSteer2; the least is 0
WORDS_A_POINT, CHARACTERS_A_POINT = 2, 20  # of complexity and of verbosity

Verdicts = tuple[bool, ...]  # on one response, one a check
Answered = tuple[Facts, str]  # what was asked, and a response to it


class Kind(NamedTuple):
    """How instructions of one kind are made, answered and checked."""

    draw: Callable[[Random], Facts]
    say: Callable[[Facts], str]
    answer: Callable[[Facts, Random], str]
    texts: Callable[[], Iterator[str]]
    check: Callable[[Sequence[Answered]], list[Verdicts]]


KINDS = {
    name: Kind(made.draw, made.say, made.answer, made.texts, made.check)
    for name, made in (("general", general_tasks), ("code", code_tasks))
}

COMPARED = ("general",)  # kinds whose demonstrations are wrong often enough to be compared


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
        facts = {"kind": kind, **facts, "origin": f"align.procedural.tasks {place}"}
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
    """General instructions with different answers in the demonstrations' manner, rated; no group is all alike."""
    if kind not in COMPARED:
        raise InputError(f"there are no comparisons of {kind!r}; there are: {', '.join(COMPARED)}")
    if not 2 <= num_responses <= MOST_RESPONSES:
        raise InputError(f"num_responses is {num_responses}; it can be 2 to {MOST_RESPONSES}")
    rows = _rows(kind, "comparisons", num_rows=num_rows, seed=seed, split=split)
    return [Comparison(row.prompt, _responses(row, num_responses), metadata=row.facts) for row in rows]


def _responses(row: _Row, num_responses: int) -> tuple[Response, ...]:
    found: dict[str, Response] = {}
    while len(found) < num_responses:
        answer = row.answer()
        verdicts = grade(row.facts, answer)
        response = Response(answer, reward(verdicts), attributes(verdicts, answer))
        alike = {other.reward for other in found.values()} == {response.reward}
        if len(found) < num_responses - 1 or not alike:
            found[answer] = response
    return tuple(found.values())


def grade(metadata: Facts, response: str) -> Verdicts:
    """One verdict a check, on a response to the prompt with this metadata; it passes when all of them hold."""
    return grades([(metadata, response)])[0]


def grades(rows: Sequence[Answered]) -> list[Verdicts]:
    """The verdicts on each response, in order; programs run side by side, and each different one once."""
    by_kind: dict[str, list[int]] = {}
    for index, (metadata, _) in enumerate(rows):
        by_kind.setdefault(str(metadata.get("kind")), []).append(index)
    found: dict[int, Verdicts] = {}
    for kind, places in by_kind.items():
        check = pick(KINDS, kind, "kind of task").check
        found |= zip(places, check([rows[place] for place in places]), strict=True)
    return [found[index] for index in range(len(rows))]


def reward(verdicts: Verdicts) -> float:
    """Half the share of the checks that hold, and half if all of them do: 0 to 1."""
    return 0.5 * sum(verdicts) / len(verdicts) + 0.5 * all(verdicts)


def attributes(verdicts: Verdicts, response: str) -> dict[str, float]:
    """HelpSteer's five attributes, 0 to 4, of a response: three from the checks, two from the text alone."""
    first_failure = verdicts.index(False) if False in verdicts else len(verdicts)
    return {
        "helpfulness": TOP * reward(verdicts),
        "correctness": TOP * sum(verdicts) / len(verdicts),
        "coherence": TOP * first_failure / len(verdicts),
        "complexity": min(TOP, len(set(re.findall(r"\w+", response.lower()))) / WORDS_A_POINT),
        "verbosity": min(TOP, len(response) / CHARACTERS_A_POINT),
    }


def corpus() -> Iterator[str]:
    """Texts for the tokenizer, so that every word of every kind of task becomes one token."""
    yield from ("system", "user", "assistant")
    for kind in KINDS.values():
        yield from kind.texts()
