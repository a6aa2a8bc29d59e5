"""The graph of steps: order, fingerprints and dependents."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from align.config import stable_hash
from align.errors import InputError
from align.registry import pick, suggest

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.partial)")
MAX_NAME = 200  # characters of a folder name; file systems allow 255 bytes, and temporary names are longer


@dataclass(frozen=True, slots=True)
class Step:
    """A step that fills one folder.

    `inputs` names the steps whose folders it reads; `key` is a hash of everything else that determines its content.
    """

    name: str
    inputs: tuple[str, ...]
    key: str

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> None:
    """Raise `InputError` if a step name is not usable as a folder name."""
    if not FOLDER_NAME.fullmatch(name):
        raise InputError(
            "a step name is also a folder name: letters, digits, '-', '_' and '.', starting with a letter or digit "
            f"and not ending in '.partial', not {name!r}",
            ("steps", name),
        )
    if len(name) > MAX_NAME:
        raise InputError(f"a step name has at most {MAX_NAME} characters, not {len(name)}", ("steps", name))


def order(steps: Sequence[Step]) -> list[Step]:
    """Return the steps in an order in which each follows its inputs, with ties in the given order.

    Raises `InputError` for duplicate names, unknown inputs and cycles.
    """
    names = [step.name for step in steps]
    for step in steps:
        if names.count(step.name) > 1:
            raise InputError(f"two steps are called {step.name!r}; step names must be unique", ("steps", step.name))
        for name in step.inputs:
            if name not in names:
                message = f"step {step.name!r} reads {name!r}, which is not a step; {suggest(name, names)}"
                raise InputError(message, ("steps", step.name))
    positions = {name: position for position, name in enumerate(names)}
    sorter = TopologicalSorter({step.name: step.inputs for step in steps})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1][::-1]  # each reads the next; the first is also the last
        raise InputError(f"steps depend on each other in a cycle: {' -> '.join(cycle)}", ("steps", cycle[0])) from error
    ordered: list[Step] = []
    ready: list[int] = []  # a heap of positions
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, positions[name])
        step = steps[heapq.heappop(ready)]
        ordered.append(step)
        sorter.done(step.name)
    return ordered


def fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """Return a hash per step that changes with the step's key or the fingerprint of any of its inputs."""
    found: dict[str, str] = {}
    for step in order(steps):
        found[step.name] = stable_hash([step.key, {name: found[name] for name in step.inputs}])
    return found


def dependents(steps: Sequence[Step], names: Sequence[str]) -> set[str]:
    """Return the named steps and all steps that depend on them, directly or indirectly."""
    known = {step.name: step for step in steps}
    found = {pick(known, name, "step").name for name in names}
    for step in order(steps):
        if found & set(step.inputs):
            found.add(step.name)
    return found
