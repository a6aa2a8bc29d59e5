"""What is measured of any responses beside their grades: endless loops, length, refusals.

A policy can win a judge's or a program's grade and still be worse to use. These measures need no judge.
"""

from __future__ import annotations

from collections.abc import Sequence

from align.evaluation.task import Parts
from align.rewards.thoughts import THINK, ThoughtSettings, visible_text
from align.rewards.verifiers.refusals import is_refusal

KL_FROM_START = "kl_from_start"  # nats per token, where a step asks for it
MEASURES = ("repetition", "length", "refusals", KL_FROM_START)
MAX_PERIOD = 300  # characters that a loop repeats
MIN_REPEATS = 4
MIN_LOOP = 40  # characters; a shorter repetition, such as "ha ha ha ha", ends ordinary texts


def measure_parts(responses: Sequence[str], thoughts: ThoughtSettings = THINK) -> Parts:
    """Return (sum, count) of each measure that the texts decide, over the responses to one row.

    `repetition` is the share of responses that end in a loop, `length` the mean number of characters, and `refusals`
    the share that declines near the beginning of what follows its thoughts (`align.rewards.verifiers.refusals`: English
    phrases).
    """
    number = len(responses)
    return {
        "repetition": (sum(map(ends_in_loop, responses)), number),
        "length": (sum(map(len, responses)), number),
        "refusals": (sum(is_refusal(visible_text(each, thoughts)) for each in responses), number),
    }


def ends_in_loop(text: str) -> bool:
    """Return whether a text ends with the same characters, at most MAX_PERIOD, at least MIN_REPEATS times.

    >>> ends_in_loop("It is red. " + "And it is blue. " * 5), ends_in_loop("ha ha ha ha")
    (True, False)
    """
    text = text.rstrip()
    for period in range(1, min(MAX_PERIOD, len(text) // MIN_REPEATS) + 1):
        span = max(MIN_REPEATS * period, MIN_LOOP)
        end = text[-span:]
        if len(end) == span and end[period:] == end[:-period]:
            return True
    return False
