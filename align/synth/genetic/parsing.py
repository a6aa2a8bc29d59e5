"""Tasks and tests in a model's answers. Tasks may hold lists and code, so they are asked for between marks."""

from __future__ import annotations

import re
from collections import Counter

from align.records import is_cut_off
from align.rewards.verifiers.refusals import is_refusal
from align.synth.parsing.lists import (
    CHAT,
    CUT,
    EMPTY,
    LABEL,
    NOT_A_LIST,
    REFUSED,
    TOO_FEW,
    TOO_LONG_ITEM,
    Parsed,
    items,
    same,
)

MARKED = re.compile(r"<task>(.*?)(</task>|(?=<task>)|\Z)", re.DOTALL | re.IGNORECASE)
MAX_TASK_WORDS = 600  # with code that a task quotes; longer ones are not what was asked for
ASSERT = re.compile(r"^assert\b.+$", re.MULTILINE)


def tasks(text: str, wanted: int, *, finish: str | None = None) -> Parsed:
    r"""Return the first `wanted` tasks of an answer that ended with `finish`, in order.

    They are what is between the marks; without marks, a list, or the whole answer where one is wanted.

    >>> tasks("Sure:\n<task>\nAdd x[0] and x[1].\n</task>", 1).items
    ('Add x[0] and x[1].',)
    """
    if not text.strip():
        return Parsed((), Counter({EMPTY: wanted}))
    matches = list(MARKED.finditer(text))
    is_cut = is_cut_off(finish)
    if not matches and wanted > 1:
        return items(text, wanted, finish=finish)
    if not matches:
        reason = REFUSED if is_refusal(text) else CUT if is_cut else ""
        found = [] if reason else [_without_chat(text)]
    else:
        is_open = is_cut and not matches[-1][2]
        found = [match[1].strip() for match in (matches[:-1] if is_open else matches)]
        reason = CUT if is_open else TOO_FEW
    kept = list[str]()
    lost = Counter[str]()
    for task in found[:wanted]:
        why = EMPTY if not same(task) else TOO_LONG_ITEM if len(task.split()) > MAX_TASK_WORDS else ""
        if why:
            lost[why] += 1
        else:
            kept.append(task)
    if missing := wanted - len(found[:wanted]):
        lost[reason or NOT_A_LIST] += missing
    return Parsed(tuple(kept), lost, max(0, len(found) - wanted))


def _without_chat(text: str) -> str:
    """Return an answer without a first line that introduces it, and without its label."""
    first, _, rest = text.strip().partition("\n")
    if rest.strip() and CHAT.match(first) and first.rstrip(" *_").endswith(":"):
        text = rest
    return LABEL.sub("", text.strip()).strip()


def asserts(text: str) -> list[str]:
    r"""Return the distinct lines of an answer that begin as assert statements do.

    >>> asserts("Here they are:\n```python\nassert f(1) == 2\nassert f(\n```")
    ['assert f(1) == 2', 'assert f(']
    """
    return [line.strip() for line in dict.fromkeys(ASSERT.findall(text))]
