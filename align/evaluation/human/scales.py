"""The questions of a human evaluation.

Five levels of helpfulness and of truthfulness, one for complete failure, and the perceived length, as in the
Nemotron-4 report (sec. 3.4.2), which does not publish its definitions of the levels.
"""

from __future__ import annotations

HELPFULNESS, TRUTHFULNESS = "helpfulness", "truthfulness"
FAILURE, LENGTH = "complete_failure", "length"
LEVELS = range(1, 6)
FAILED = 0  # level on both scales of a response that does not follow the instruction at all

SCALES: dict[str, dict[int, str]] = {
    HELPFULNESS: {
        5: "Does all that was asked, completely and clearly; could be used as it is.",
        4: "Does what was asked; a small part is missing, unclear or not needed.",
        3: "Does the main part of what was asked; a clear part is missing or wrong.",
        2: "Does a small part of what was asked, or needs much work to be of use.",
        1: "Is about what was asked, but of no use.",
    },
    TRUTHFULNESS: {
        5: "Everything is correct, as far as can be checked.",
        4: "Correct but for a detail that misleads nobody.",
        3: "Mostly correct; an error that a reader should know of.",
        2: "A grave error, or several errors.",
        1: "Mostly false, or made up.",
    },
}
LENGTHS = ("too short", "just right", "too long")
FAILURE_TEXT = (
    "Complete failure: does not follow the instruction at all, such as no answer or a refusal without reason."
)
