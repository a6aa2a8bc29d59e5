"""Code prompting: write new code tasks from given ones, by changing a step of one or by combining the steps of two.

They let a small model learn to be the instructor of the family `genetic_code`. Tasks of the test split never occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from random import Random
from typing import Any

from align.procedural import code
from align.procedural.splits import split_of

Spec = Mapping[str, Any]

MUTATION = "{heuristic}\n{prompt}"
HEURISTICS = {  # how to mutate a task
    "keep": "Write this task with another first step.",
    "change": "Write this task with another step in the middle.",
    "return": "Write this task with another last step.",
}
CROSSOVER = "Write {number} new tasks from the steps of these.\n{examples}"
NUMBER = 2  # tasks that are shown, and tasks that are written


def draw(rng: Random) -> Spec:
    """Return tasks to combine, or one to change and how; each allows enough answers of the training split."""
    while True:
        heuristic = rng.choice(list(HEURISTICS)) if rng.random() < 1 / 2 else None
        examples = [code.draw(rng)["steps"] for _ in range(NUMBER if heuristic is None else 1)]
        spec = {"heuristic": heuristic, "examples": examples}
        if all(split_of(each) == "train" for each in _shown(spec)) and len(_new(spec)) >= len(examples):
            return spec


def instruction(spec: Spec) -> str:
    """Return the request in words, as the family `genetic_code` writes it."""
    texts = _shown(spec)
    if spec["heuristic"] is not None:
        return MUTATION.format(heuristic=HEURISTICS[spec["heuristic"]], prompt=texts[0])
    return CROSSOVER.format(number=NUMBER, examples=listed(texts))


def listed(examples: Sequence[str]) -> str:
    """Return the tasks between marks, as the family `genetic_code` shows them."""
    return "\n\n".join(f"<task>\n{each}\n</task>" for each in examples)


def answer(spec: Spec, rng: Random) -> str:
    """Return a new task, or a numbered list of them, all of the training split."""
    if spec["heuristic"] is not None:
        return rng.choice(_new(spec))
    return "\n".join(f"{number}. {text}" for number, text in enumerate(rng.sample(_new(spec), NUMBER), start=1))


def _shown(spec: Spec) -> list[str]:
    return [code.instruction({"steps": steps}) for steps in spec["examples"]]


def _new(spec: Spec) -> list[str]:
    """Return the tasks of the training split that can be made of the ones shown."""
    steps = _mutations(spec["examples"][0], spec["heuristic"]) if spec["heuristic"] else _crosses(spec["examples"])
    texts = sorted({code.instruction({"steps": each}) for each in steps} - {*_shown(spec)})
    return [text for text in texts if split_of(text) == "train"]


def _mutations(steps: list[str], heuristic: str) -> Iterator[list[str]]:
    """Yield the steps with another one at a place of the heuristic."""
    table, places = {
        "keep": (code.KEEP, [0]),
        "change": (code.CHANGE, range(1, len(steps) - 1)),
        "return": (code.RETURN, [len(steps) - 1]),
    }[heuristic]
    for place in places:
        yield from ([*steps[:place], other, *steps[place + 1 :]] for other in table)


def _crosses(parents: Sequence[list[str]]) -> Iterator[list[str]]:
    """Yield the first step of a parent, one or two steps from the middle of all, and the last step of a parent."""
    changes = sorted({step for parent in parents for step in parent[1:-1]})
    middles = [list(each) for number in code.NUM_CHANGES for each in permutations(changes, number)]
    for first, middle, last in product(parents, middles, parents):
        yield [first[0], *middle, last[-1]]


def check(rows: Sequence[tuple[Spec, str]]) -> list[tuple[bool, ...]]:
    """Return the verdicts on each response: on its number of tasks, on their form, and whether all are new."""
    return [_verdicts(spec, response.split("\n")) for spec, response in rows]


def _verdicts(spec: Spec, lines: Sequence[str]) -> tuple[bool, ...]:
    is_list = spec["heuristic"] is None
    written = [line.removeprefix(f"{number}. ") if is_list else line for number, line in enumerate(lines, start=1)]
    shown = {*_shown(spec)}
    return (
        len(lines) == (NUMBER if is_list else 1),
        all(code.parse(each) is not None for each in written),
        not {*written} & shown,
    )
