"""A judge's verdict on a response, and the interface of every judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from align.records import Prompt

# Batch size in groups: a reward model tokenizes this many at a time, and a combination passes this many to one judge
# before the next. A killed run loses at most one batch of verdicts.
GROUPS_AT_ONCE = 64

# A prompt and its responses, which a judge sees together
Group = tuple[Prompt, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one response. A judge that cannot rate it abstains: `reward` is None, with the reason in `why`."""

    reward: float | None
    attributes: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    raw: Any = None  # the evidence, as JSON values: an extracted answer, a model's text, the result of each test


class Judge(Protocol):
    """Rates the responses of groups.

    The verdicts on a group must not depend on the other groups of the call: processes divide groups among each other,
    and a resumed run asks for the missing ones only.
    """

    def __call__(self, groups: Sequence[Group]) -> Iterable[tuple[Verdict, ...]]:
        """Yield one tuple per group, in order, as soon as it is known, with one verdict per response."""
        ...
