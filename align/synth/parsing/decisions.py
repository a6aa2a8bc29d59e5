"""Decisions in a teacher's answer: yes or no, and the verdict of a judge; and thresholds on likelihoods."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

LEADING = re.compile(r"^[\s\W_]*(?:(?:answer|final answer|verdict)\s*(?:is)?[\s\W_]*)?(\w+)", re.IGNORECASE)
DECISION = re.compile(r"\[\[\s*(\w+)\s*\]\]")
YES, NO = frozenset({"yes", "true"}), frozenset({"no", "false"})
ACCEPTED = YES | {"pass", "passed", "correct", "accept"}
REJECTED = NO | {"fail", "failed", "incorrect", "reject"}


def yes_no(text: str) -> bool | None:
    """Return whether an answer begins with yes or with no; None if it begins with neither.

    >>> yes_no("**Yes**, it is."), yes_no("Answer: no"), yes_no("Nobody knows.")
    (True, False, None)
    """
    found = LEADING.match(text)
    word = found[1].lower() if found else ""
    return True if word in YES else False if word in NO else None


def verdict(text: str, accepted: Collection[str] = ACCEPTED, rejected: Collection[str] = REJECTED) -> bool | None:
    r"""Return a judge's decision: its last mark in double brackets, else the only word of its last line; None without.

    >>> verdict("The second loop is wrong.\n[[fail]]"), verdict("It works.\nVerdict: pass"), verdict("It may pass.")
    (False, True, None)
    """
    marks = DECISION.findall(text)
    lines = text.strip().splitlines()
    words = re.findall(r"\w+", lines[-1].lower()) if lines else []
    words = [word for word in words if word not in ("verdict", "decision", "answer", "final")]
    word = marks[-1].lower() if marks else words[0] if len(words) == 1 else ""
    return True if word in accepted else False if word in rejected else None


def best_threshold(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the threshold on scores that classifies most labelled examples correctly: yes where a score exceeds it.

    Of several it is the middle of the lowest such gap between two scores. Raises `ValueError` unless both labels occur.

    >>> best_threshold([-2.0, -1.0, 0.5, 3.0], [False, False, True, True])
    -0.25
    """
    if len(set(labels)) < 2:  # noqa: PLR2004 - yes and no
        raise ValueError("a threshold needs labelled examples of both kinds")
    ranked = sorted(set(scores))
    gaps = [ranked[0] - 1, *((low + high) / 2 for low, high in zip(ranked, ranked[1:], strict=False)), ranked[-1] + 1]
    return max(gaps, key=lambda gap: sum((score > gap) == label for score, label in zip(scores, labels, strict=True)))
