"""What a judge says of a response, and the form that every judge has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from align.records import Prompt

# That are looked at in one go: a reward model has so many made into tokens, and a combination asks each of its judges
# about so many before the next. What a kill costs at most.
GROUPS_AT_ONCE = 64

# A prompt and its responses, which a judge sees together.
Group = tuple[Prompt, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How good one response is; a judge that cannot say so abstains."""

    reward: float | None  # None: nothing is known of this response, for the reason that `why` gives
    attributes: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    raw: Any = None  # what the judge saw, as JSON values: an answer it extracted, a model's words, each test's result


class Judge(Protocol):
    """One verdict a response, in order; groups come back in the order that they were given in.

    What it says of a group must not depend on the others of the call: processes share them out, and after a kill a
    judge is asked about what is left.
    """

    def __call__(self, groups: Sequence[Group]) -> Iterable[tuple[Verdict, ...]]:
        """One tuple a group, as soon as it is known."""
        ...
