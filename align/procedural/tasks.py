"""Procedural tasks: instructions that a program generates and checks.

A row depends on (kind, purpose, seed, split, index) only. Its metadata suffices to grade a response to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from random import Random
from typing import Any, NamedTuple

from align.errors import InputError
from align.procedural import code, code_prompting, dialogues, general, prompting, user_turns
from align.procedural.splits import SPLITS, split_of
from align.records import Comparison, Demonstration, Message, Prompt, Response
from align.registry import pick

Spec = Mapping[str, Any]  # what a row asks for, as JSON values; stored in the row's metadata

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
    check: Callable[[Sequence[SpecAndResponse]], list[Verdicts]]
    vocabulary_texts: Callable[[], Iterable[str]] = lambda: ()  # none: its words are those of another kind
    later_turns: Callable[[Spec, Random], Sequence[str]] = lambda _spec, _rng: ()  # of the user and of the assistant


def _kind(module: Any, **more: Any) -> Kind:  # noqa: ANN401 - a module of this package, and more of its functions
    return Kind(module.draw, module.instruction, module.answer, module.check, **more)


KINDS = {
    "general": _kind(general, vocabulary_texts=general.vocabulary_texts),
    "code": _kind(code, vocabulary_texts=code.vocabulary_texts),
    "prompting": _kind(prompting),
    "code_prompting": _kind(code_prompting),
    "user_turns": _kind(user_turns),
    "dialogues": _kind(dialogues, later_turns=dialogues.later_turns),
}

COMPARED = ("general",)  # kinds whose demonstrations contain enough errors to be compared


class _Row(NamedTuple):
    spec: Spec
    prompt: tuple[Message, ...]
    answer: Callable[[], str]  # returns another answer on each call
    later_turns: Callable[[], Sequence[str]]


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
        yield _Row(spec, prompt, partial(functions.answer, spec, rng), partial(functions.later_turns, spec, rng))


def prompts(kind: str, *, num_rows: int, seed: int, split: str) -> list[Prompt]:
    """Return distinct prompts; their metadata is what `grade` needs.

    Raises `InputError` if four times as many draws contain fewer distinct instructions.
    """
    found: dict[tuple[Message, ...], Spec] = {}
    for row in _rows(kind, "prompts", num_rows=MAX_DRAWS * num_rows, seed=seed, split=split):
        if len(found) == num_rows:
            break
        found.setdefault(row.prompt, row.spec)
    if len(found) < num_rows:
        raise InputError(
            f"num_rows is {num_rows}, but {MAX_DRAWS * num_rows} draws of split {split} contain only {len(found)} "
            f"distinct {kind} prompts"
        )
    return [Prompt(prompt, spec) for prompt, spec in found.items()]


def demonstrations(kind: str, *, num_rows: int, seed: int, split: str = "train") -> list[Demonstration]:
    """Return instructions with one answer each, or dialogues; some answers contain deliberate errors."""
    rows = _rows(kind, "demonstrations", num_rows=num_rows, seed=seed, split=split)
    return [Demonstration(_dialogue(row), row.spec) for row in rows]


def _dialogue(row: _Row) -> tuple[Message, ...]:
    roles = cycle(("assistant", "user"))
    return (*row.prompt, *map(Message, roles, (row.answer(), *row.later_turns())))


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
