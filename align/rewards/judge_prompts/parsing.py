"""Read the decision in a judge's answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from align.records import Message
from align.rewards.thoughts import VisibleText, visible_text

MIN_RATING, MAX_RATING = 1.0, 10.0
DECISION = re.compile(r"\[\[\s*([^\[\]\s](?:[^\[\]]{0,6}[^\[\]\s])?|(?<=\s)(?=\]\]))\s*\]\]")  # empty for spaces only
LABELS = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}  # of Arena-Hard: is A the better one


class Decision(NamedTuple):
    """What a judge decides: a rating, or whether the first answer is better (1), worse (0) or neither (0.5)."""

    value: float
    is_clear: bool = False  # better or worse by much


class Question(NamedTuple):
    """What a judge is asked, and how its answer is read."""

    messages: tuple[Message, ...]
    parse: Callable[[str], Decision | None]
    form: str  # that the answer should end in


def parse_preference(answer: str) -> Decision | None:
    """Return the decision about the first answer; None without a decision at the end.

    A decision in a thought is none, nor is one in an answer that was cut off.

    >>> parse_preference("Both are correct, but A is shorter. [[A]]").value
    1.0
    """
    value = {"A": 1.0, "B": 0.0, "C": 0.5}.get(_last_decision(answer).upper())
    return None if value is None else Decision(value)


def parse_yes_no(answer: str) -> Decision | None:
    """Return 1 for a last decision of yes, 0 for no; None without one, in a thought, or of a cut answer.

    >>> parse_yes_no("Both ask for the same sum. [[Yes]]").value
    1.0
    """
    value = {"YES": 1.0, "NO": 0.0}.get(_last_decision(answer).upper())
    return None if value is None else Decision(value)


def parse_label(answer: str) -> Decision | None:
    """Return the decision of the last label of Arena-Hard, in double brackets or else in single ones.

    >>> parse_label("A is correct, B is not. My final verdict is: [[A>>B]]")
    Decision(value=1.0, is_clear=True)
    """
    visible = readable(answer)
    marks = [mark for pattern in LABEL_MARKS for mark in pattern.findall(visible.upper())[-1:]]
    label = normal_label(marks[0]) if marks else None
    return None if label is None else Decision(LABELS[label], ">>" in label)


LABEL_MARKS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))


def normal_label(mark: str) -> str | None:
    """Return one of `LABELS`, also for `B<A`, `B<<A`, `A<B`, `A<<B` and `B=A`; None for anything else."""
    if mark in LABELS:
        return mark
    mirrored = mark[::-1].replace("<", ">")
    return mirrored if mirrored in LABELS else None


def parse_rating(answer: str) -> Decision | None:
    """Return the last number in double brackets; None if it is not a rating, in a thought, or of a cut answer.

    >>> parse_rating("Correct and clear. [[8]]").value
    8.0
    """
    decision = _last_decision(answer)
    if not re.fullmatch(r"\d{1,2}(\.\d{1,2})?", decision):
        return None
    return Decision(value) if MIN_RATING <= (value := float(decision)) <= MAX_RATING else None


def parse_first_rating(answer: str) -> Decision | None:
    """Return the rating as FastChat reads it: the first number in double brackets, or else in single ones.

    The number may be any, also that of a citation such as [2].

    >>> parse_first_rating("See [2]. Rating: [[7.5]]").value, parse_first_rating("Rating: [7]").value
    (7.5, 7.0)
    """
    visible = readable(answer)
    found = next((match for mark in RATING_MARKS if (match := mark.search(visible))), None)
    return None if found is None else Decision(float(found[1]))


RATING_MARKS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))


def parse_first_preference(answer: str) -> Decision | None:
    """Return the decision as FastChat reads it: [[A]] if it occurs, else [[B]], else [[C]]."""
    visible = readable(answer)
    values = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
    return next((Decision(value) for mark, value in values.items() if mark in visible), None)


RATING_FORMATS = {"[[rating]]": (parse_first_rating, "the rating in double brackets, such as [[5]]")}
PAIR_FORMATS = {
    "[[A]]": (parse_first_preference, "[[A]], [[B]] or [[C]]"),
    "[[A>>B]]": (parse_label, "one of " + ", ".join(f"[[{label}]]" for label in LABELS)),
}
OUTPUT_FORMATS = {**RATING_FORMATS, **PAIR_FORMATS}


def readable(answer: str) -> VisibleText:
    """Return the text of an answer without thoughts; empty if it was cut off."""
    visible = visible_text(answer)
    return VisibleText("") if visible.is_cut else visible


def _last_decision(answer: str) -> str:
    decisions = DECISION.findall(readable(answer))
    return decisions[-1] if decisions else ""
