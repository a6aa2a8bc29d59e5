r"""Find the final answer in a response.

It is given as in GSM8K (`#### 42`), in `\boxed{...}`, in words ("the answer is 42"), or as the last number.
"""

from __future__ import annotations

import re

from align.rewards.answers.quantities import parse_quantity

MAX_LENGTH = 1000  # characters of an answer

MARKER = re.compile(r"####[ \t]*(?P<answer>\S.*)(?P<rest>\s*)")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
STATED = re.compile(
    r"\banswer\**\s*(?:is|are|=|:)\**:?\s*\**(?:(?:about|approximately|roughly)\s)?(?=\S)", re.IGNORECASE
)
EXPLANATION = re.compile(r"\n.*|(?<=\S)[.!](?:\s.*)?$|\*\*.*|\s(?:because|since|which|so that)\b.*", re.DOTALL)
FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$(?!\w|\.\d)|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]",
    re.DOTALL,
)
NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?[$€£¥₹]?(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?(?![\d])%?|(?<![\w.,])\.\d+%?"
)
MAX_WORDS = 5  # of an answer without a number: "the answer is the red one"
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def final_answer(text: str) -> str | None:
    r"""Return the answer that a response gives, as it is written there; None where it gives none.

    >>> final_answer(r"Half of 84 is \boxed{42}.")
    '42'
    """
    answer = _after_marker(text) or _last_boxed(text) or _stated(text)
    if answer:
        return answer
    if "\n" not in text.strip() and len(WORD.findall(text)) <= 1:
        return strip_markup(text) or None
    return _last_value(text)


def _after_marker(text: str) -> str | None:
    """Return what follows `####`: a number, or the last line. Other lines with this marker are headings."""
    for match in reversed(list(MARKER.finditer(text))):
        number = parse_quantity(strip_markup(match["answer"]))
        if match.end() == len(text) or (number and not number.unit):
            return strip_markup(match["answer"])
    return None


def _stated(text: str) -> str | None:
    """Return the last text that follows "the answer is", if it is short or has a number."""
    for match in reversed(list(STATED.finditer(text))):
        rest = text[match.end() : match.end() + MAX_LENGTH]
        formula = FORMULA.match(rest)
        answer = strip_markup(_inside(formula) if formula else EXPLANATION.sub("", rest))
        if answer and (re.search(r"[\d\\]", answer) or len(answer.split()) <= MAX_WORDS):
            return answer
    return None


def _last_boxed(text: str) -> str | None:
    """Return the content of the last box whose braces are balanced."""
    for start in reversed(list(BOXED.finditer(text))):
        depth = 1
        for index in range(start.end(), min(len(text), start.end() + MAX_LENGTH)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return strip_markup(text[start.end() : index])
    return None


def _last_value(text: str) -> str | None:
    """Return the last number, or the formula that contains it."""
    numbers, formulas = list(NUMBER.finditer(text)), list(FORMULA.finditer(text))
    if not numbers:
        return None
    if formulas and formulas[-1].start() <= numbers[-1].start() < formulas[-1].end():
        return strip_markup(_inside(formulas[-1]))
    return numbers[-1].group()


def _inside(formula: re.Match[str]) -> str:
    return formula[formula.lastgroup or 0]


def strip_markup(text: str) -> str:
    """Return an answer without the Markdown, punctuation, dollar signs and box around it."""
    text = text.strip().strip("*").rstrip(".,;: ").strip()
    formula = FORMULA.fullmatch(text)
    text = _inside(formula).strip() if formula else text
    if (box := BOXED.match(text)) and text.endswith("}"):
        text = text[box.end() : -1].strip()
    return text
