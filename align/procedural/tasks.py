"""Procedural tasks: instructions that a program generates and checks.

A row depends on (kind, purpose, seed, split, index) only. Its metadata suffices to grade a response to it.
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

Spec = Mapping[str, Any]  # what a row asks for, as JSON values; stored in the row's metadata

SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}  # tenths of all instructions
MAX_DRAWS = 4  # instructions drawn for each distinct prompt
MAX_RESPONSES = 6  # the instruction with the fewest distinct answers has six
MAX_ATTRIBUTE = 4.0  # as in HelpSteer2; the minimum is 0
WORDS_PER_POINT, CHARACTERS_PER_POINT = 2, 20  # of complexity and of verbosity

Verdicts = tuple[bool, ...]  # one per check of a response
SpecAndResponse = tuple[Spec, str]


class Kind(NamedTuple):
    """The functions that generate, answer and check one kind of instruction."""

    draw: Callable[[Random], Spec]
    instruction: Callable[[Spec], str]
    answer: Callable[[Spec, Random], str]
    vocabulary_texts: Callable[[], Iterator[str]]
    check: Callable[[Sequence[SpecAndResponse]], list[Verdicts]]


KINDS = {
    name: Kind(module.draw, module.instruction, module.answer, module.vocabulary_texts, module.check)
    for name, module in (("general", general_tasks), ("code", code_tasks))
}

COMPARED = ("general",)  # kinds whose demonstrations contain enough errors to be compared


def split_of(instruction: str) -> str:
    """Return the split of an instruction, a hash of its sorted words, so that all of its reorderings share a split.

    >>> split_of("List three tools.") == split_of("tools, three List")
    True
    """
    words = " ".join(sorted(re.findall(r"\w+", instruction)))
    tenth = int.from_bytes(hashlib.sha256(words.encode()).digest()) % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


class _Row(NamedTuple):
    spec: Spec
    prompt: tuple[Message, ...]
    answer: Callable[[], str]  # returns another answer on each call


def _rows(kind: str, purpose: str, *, num_rows: int, seed: int, split: str) -> Iterator[_Row]:
    """Yield rows whose instructions are drawn until they belong to `split`."""
    pick(SPLITS, split, "split")
    functions = pick(KINDS, kind, "kind of task")
    for index in range(num_rows):
        place = repr((seed, kind, purpose, split, index))
        rng = Random(hashlib.sha256(place.encode()).digest())
        spec = functions.draw(rng)
        while split_of(functions.instruction(spec)) != split:
            spec = functions.draw(rng)
        prompt = (Message("user", functions.instruction(spec)),)
        spec = {"kind": kind, **spec, "origin": f"align.procedural.tasks {place}"}
        yield _Row(spec, prompt, partial(functions.answer, spec, rng))


def prompts(kind: str, *, num_rows: int, seed: int, split: str) -> list[Prompt]:
    """Return distinct prompts; their metadata is what `grade` needs.

    Raises `InputError` if the split has fewer distinct instructions of this kind.
    """
    found: dict[tuple[Message, ...], Spec] = {}
    for row in _rows(kind, "prompts", num_rows=MAX_DRAWS * num_rows, seed=seed, split=split):
        if len(found) == num_rows:
            break
        found.setdefault(row.prompt, row.spec)
    if len(found) < num_rows:
        raise InputError(f"num_rows is {num_rows}, but split {split} has only {len(found)} distinct {kind} prompts")
    return [Prompt(prompt, spec) for prompt, spec in found.items()]


def demonstrations(kind: str, *, num_rows: int, seed: int, split: str = "train") -> list[Demonstration]:
    """Return instructions with one answer each; some answers contain deliberate errors."""
    rows = _rows(kind, "demonstrations", num_rows=num_rows, seed=seed, split=split)
    return [Demonstration((*row.prompt, Message("assistant", row.answer())), row.spec) for row in rows]


def comparisons(kind: str, *, num_rows: int, num_responses: int, seed: int, split: str = "train") -> list[Comparison]:
    """Return instructions with distinct, rated answers drawn as for `demonstrations`; rewards differ within a group."""
    if kind not in COMPARED:
        raise InputError(f"there are no comparisons of {kind!r}; choose one of: {', '.join(COMPARED)}")
    if not 2 <= num_responses <= MAX_RESPONSES:
        raise InputError(f"num_responses is {num_responses}; it must be 2 to {MAX_RESPONSES}")
    rows = _rows(kind, "comparisons", num_rows=num_rows, seed=seed, split=split)
    return [Comparison(row.prompt, _responses(row, num_responses), metadata=row.spec) for row in rows]


def _responses(row: _Row, num_responses: int) -> tuple[Response, ...]:
    found: dict[str, Response] = {}
    while len(found) < num_responses:
        answer = row.answer()
        verdicts = grade(row.spec, answer)
        response = Response(answer, reward(verdicts), attributes(verdicts, answer))
        are_equal = {other.reward for other in found.values()} == {response.reward}
        if len(found) < num_responses - 1 or not are_equal:
            found[answer] = response
    return tuple(found.values())


def grade(metadata: Spec, response: str) -> Verdicts:
    """Return one verdict per check of a response to the prompt with this metadata; it passes if all are true."""
    return grade_all([(metadata, response)])[0]


def grade_all(rows: Sequence[SpecAndResponse]) -> list[Verdicts]:
    """Return the verdicts on each response, in order; distinct programs run once each, in parallel."""
    by_kind: dict[str, list[int]] = {}
    for index, (metadata, _) in enumerate(rows):
        by_kind.setdefault(str(metadata.get("kind")), []).append(index)
    found: dict[int, Verdicts] = {}
    for kind, indices in by_kind.items():
        check = pick(KINDS, kind, "kind of task").check
        found |= zip(indices, check([rows[index] for index in indices]), strict=True)
    return [found[index] for index in range(len(rows))]


def reward(verdicts: Verdicts) -> float:
    """Return half the share of checks passed, plus one half if all are: 0 to 1.

    >>> reward((True, False)), reward((True, True))
    (0.25, 1.0)
    """
    return 0.5 * sum(verdicts) / len(verdicts) + 0.5 * all(verdicts)


def attributes(verdicts: Verdicts, response: str) -> dict[str, float]:
    """Return HelpSteer's five attributes of a response, 0 to 4: three from the checks, two from its text alone."""
    first_failure = verdicts.index(False) if False in verdicts else len(verdicts)
    return {
        "helpfulness": MAX_ATTRIBUTE * reward(verdicts),
        "correctness": MAX_ATTRIBUTE * sum(verdicts) / len(verdicts),
        "coherence": MAX_ATTRIBUTE * first_failure / len(verdicts),
        "complexity": min(MAX_ATTRIBUTE, len(set(re.findall(r"\w+", response.lower()))) / WORDS_PER_POINT),
        "verbosity": min(MAX_ATTRIBUTE, len(response) / CHARACTERS_PER_POINT),
    }


def corpus() -> Iterator[str]:
    """Yield texts to train a tokenizer on, so that each word of the tasks becomes one token."""
    yield from ("system", "user", "assistant")
    for kind in KINDS.values():
        yield from kind.vocabulary_texts()
