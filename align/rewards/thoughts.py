"""Thoughts: the marked part of a response before its answer, which no verifier, test or judge sees."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from align.config import Settings
from align.records import ToolCall, is_cut_off, with_calls

BLANK_LINES = re.compile(r"\A\s*\n|\A\s+(?=\S)")  # not the indentation of the first line of code


class ThoughtSettings(Settings):
    """Delimiters of the reasoning in a response, and whether to remove it."""

    strip: bool = Field(default=True, description="Remove reasoning before a response is graded or judged.")
    start: str = Field(default="<think>", min_length=1, description="Opening tag of reasoning.")
    end: str = Field(default="</think>", min_length=1, description="Closing tag of reasoning.")

    @model_validator(mode="after")
    def _check_marks(self) -> Self:
        if self.start == self.end:
            raise ValueError(f"start and end are both {self.start!r}; a thought needs two different marks")
        return self


THINK = ThoughtSettings()


class ResponseText(str):
    """A response with its thoughts, followed by its tool calls as text. `is_cut`: sampling ended before it did."""

    is_cut: bool
    content: str  # without the tool calls
    tool_calls: tuple[ToolCall, ...]

    def __new__(cls, content: str, *, is_cut: bool = False, tool_calls: tuple[ToolCall, ...] = ()) -> Self:
        """Return the text of a response."""
        self = super().__new__(cls, with_calls(content, tool_calls) if tool_calls else content)
        self.is_cut, self.content, self.tool_calls = is_cut, content, tool_calls
        return self


class VisibleText(ResponseText):
    """The part of a response that its reader sees, without thoughts."""


def response_text(text: str, finish: str | None, tool_calls: tuple[ToolCall, ...] = ()) -> ResponseText:
    """Return the text of a response that ended for this reason."""
    return ResponseText(text, is_cut=is_cut_off(finish), tool_calls=tool_calls)


def visible_text(response: str, thoughts: ThoughtSettings = THINK) -> VisibleText:
    r"""Return a response without its thoughts; empty if a thought has no end. A `VisibleText` is returned unchanged.

    A thought begins with the response where the first mark is an end: prompts may end in the mark of the start. Text
    between two thoughts is kept.

    >>> visible_text("<think>\n#### 5\n</think>\n\nThere are 4 apples."), visible_text("so it is 5</think>4")
    ('There are 4 apples.', '4')
    >>> visible_text("<think>I'd say [[3]]"), visible_text("No thought")
    ('', 'No thought')
    """
    if isinstance(response, VisibleText):
        return response
    known = response if isinstance(response, ResponseText) else ResponseText(response)
    content, is_cut, calls = known.content, known.is_cut, known.tool_calls
    if not thoughts.strip or (thoughts.start not in content and thoughts.end not in content):
        return VisibleText(content, is_cut=is_cut, tool_calls=calls)
    kept = list[str]()
    depth = 0
    for part in re.split(f"({re.escape(thoughts.start)}|{re.escape(thoughts.end)})", content):
        if part == thoughts.start:
            depth = 1
        elif part == thoughts.end:
            kept = kept if depth else []
            depth = 0
        elif not depth:
            kept.append(part)
    text = "" if depth else BLANK_LINES.sub("", "".join(kept))
    return VisibleText(text, is_cut=is_cut, tool_calls=calls)
