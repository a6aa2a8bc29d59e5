"""A judge's verdict on a response, and the interface of every judge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from align.records import Prompt, is_cut_off

# Batch size in groups: a reward model tokenizes this many at a time, and a combination passes this many to one judge
# before the next. A killed run loses at most one batch of verdicts.
GROUPS_AT_ONCE = 64

# A prompt and its responses, which a judge sees together
Group = tuple[Prompt, Sequence[str]]

# Why a game is void: it has no readable verdict
NO_MARK, REFUSAL = "no mark", "refusal"
CUT_OFF, REQUEST_FAILED, TOO_LONG = "cut off", "request failed", "prompt too long"
DECLINES = re.compile(r"\s*(I( am|['’]m) (sorry|unable)|Sorry,|I can(no|['’])t|As an AI)", re.IGNORECASE)


class Game(NamedTuple):
    """One comparison of a response with another, by a judge that sees both."""

    win: float | None  # 1 won, 0.5 a tie, 0 lost, or the probability of a win; None if the game is void
    raw: Any = ""  # the judge's text, or the log-probabilities of its tokens
    void: str = ""  # why there is no readable verdict
    is_clear: bool = False  # won or lost by much: `>>`


def why_void(text: str, finish: str | None = None) -> str:
    """Return why the text of a judge has no readable verdict; `finish` is why the text ended, if known."""
    if is_cut_off(finish):
        return CUT_OFF
    if finish == TOO_LONG:
        return TOO_LONG
    return REFUSAL if DECLINES.match(text) else NO_MARK


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one response. A judge that cannot rate it abstains: `reward` is None, with the reason in `why`.

    It is `refused` if a chat template or a server refuses the row, which is an error of the row.
    """

    reward: float | None
    attributes: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    raw: Any = None  # the evidence, as JSON values: an extracted answer, a model's text, the result of each test
    refused: bool = False
    # Of a judge that compares: for each other response, the game with this response shown first, and that with it
    # shown second
    games: Sequence[Game] = field(default_factory=list[Game])


class Judge(Protocol):
    """Rates the responses of groups.

    The verdicts on a group must not depend on the other groups of the call: processes divide groups among each other,
    and a resumed run asks for the missing ones only.
    """

    def __call__(self, groups: Sequence[Group]) -> Iterable[tuple[Verdict, ...]]:
        """Yield one tuple per group, in order, as soon as it is known, with one verdict per response."""
        ...
