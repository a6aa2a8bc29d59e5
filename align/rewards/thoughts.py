"""Thoughts: the marked part of a response before its answer, which no verifier, test or judge sees."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from align.config import Settings
from align.records import is_cut_off

BLANK_LINES = re.compile(r"\A\s*\n|\A\s+(?=\S)")  # not the indentation of the first line of code


class ThoughtSettings(Settings):
    """How the thoughts of a response are told from its answer."""

    strip: bool = Field(default=True, description="Remove thoughts before a response is graded or judged.")
    start: str = Field(default="<think>", min_length=1, description="Mark at the start of a thought.")
    end: str = Field(default="</think>", min_length=1, description="Mark at the end of a thought.")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.start == self.end:
            raise ValueError(f"start and end are both {self.start!r}; a thought needs two different marks")
        return self


THINK = ThoughtSettings()


class ResponseText(str):
    """A response with its thoughts. `is_cut`: sampling ended before the response did."""

    is_cut: bool

    def __new__(cls, text: str, *, is_cut: bool = False) -> Self:
        """Return the text of a response."""
        self = super().__new__(cls, text)
        self.is_cut = is_cut
        return self


class VisibleText(ResponseText):
    """The part of a response that its reader sees, without thoughts."""


def response_text(text: str, finish: str | None) -> ResponseText:
    """Return the text of a response that ended for this reason."""
    return ResponseText(text, is_cut=is_cut_off(finish))


def visible_text(response: str, thoughts: ThoughtSettings = THINK) -> VisibleText:
    r"""Return a response without its thoughts; empty where a thought has no end. A `VisibleText` is returned unchanged.

    A thought begins with the response where the first mark is an end: prompts may end in the mark of the start. Text
    between two thoughts is kept.

    >>> visible_text("<think>\n#### 5\n</think>\n\nThere are 4 apples."), visible_text("so it is 5</think>4")
    ('There are 4 apples.', '4')
    >>> visible_text("<think>I'd say [[3]]"), visible_text("No thought")
    ('', 'No thought')
    """
    if isinstance(response, VisibleText):
        return response
    is_cut = isinstance(response, ResponseText) and response.is_cut
    if not thoughts.strip or (thoughts.start not in response and thoughts.end not in response):
        return VisibleText(response, is_cut=is_cut)
    kept, depth = list[str](), 0
    for part in re.split(f"({re.escape(thoughts.start)}|{re.escape(thoughts.end)})", response):
        if part == thoughts.start:
            depth = 1
        elif part == thoughts.end:
            kept, depth = (kept if depth else []), 0
        elif not depth:
            kept.append(part)
    text = "" if depth else BLANK_LINES.sub("", "".join(kept))
    return VisibleText(text, is_cut=is_cut)
