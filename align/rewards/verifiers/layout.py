"""Verifiers of a response's layout: its parts, marks, beginning and end.

They give the verdicts of the published IFEval checker, as `wording` describes.
"""

from __future__ import annotations

import json
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from align.rewards.verifiers.patterns import is_found, split, valid_pattern
from align.rewards.verifiers.wording import Count, Pattern

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")
ENDS_A_WORD = frozenset(".,?!'\"")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}  # with or without spaces in them


def _valid_lowercase_pattern(marker: str) -> str:
    valid_pattern(marker.lower())
    return marker


def number_paragraphs(response: str, *, num_paragraphs: Count) -> bool:
    """Check that the dividers `***` separate exactly `num_paragraphs` texts.

    A text between two dividers must not be empty; one before the first or after the last divider may be.

    >>> number_paragraphs("One. *** Two.", num_paragraphs=2)
    True
    """
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    inner = parts[1:-1]
    return all(inner) and len([part for part in parts if part]) == num_paragraphs


def nth_paragraph_first_word(
    response: str, *, num_paragraphs: Count, nth_paragraph: Annotated[int, Field(ge=1)], first_word: str
) -> bool:
    """Check that there are exactly `num_paragraphs` paragraphs, separated by blank lines, and the first word of one.

    As published, empty paragraphs do not count towards `num_paragraphs`, but they do towards `nth_paragraph`, and the
    word ends at the first of `.,?!'"`: any other character is part of it.
    """
    parts = [part.strip() for part in response.split("\n\n")]
    count = len([part for part in parts if part])
    if nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    end = next((index for index, letter in enumerate(word) if letter in ENDS_A_WORD), len(word))
    found = "".join(letter.lower() for letter in word[:end])  # letter by letter: a final sigma stays one, as published
    return count == num_paragraphs and found == first_word.lower()


def multiple_sections(response: str, *, section_spliter: Pattern, num_sections: Count) -> bool:
    """Check that a heading, such as `Section`, is followed by a number at least `num_sections` times.

    The heading may be anywhere in a line. The parameter's spelling is that of the published data.
    """
    return len(split(section_spliter.strip(), response, around=(r"\s?", r"\s?\d+\s?"))) - 1 >= num_sections


def number_bullet_lists(response: str, *, num_bullets: Count) -> bool:
    r"""Check that exactly `num_bullets` lines begin with `*` or `-`.

    As published, a line that begins with `**` does not count, and every line that begins with a dash does, such as
    the rule `---`.

    >>> number_bullet_lists("Two:\n* one\n- two", num_bullets=2)
    True
    """
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(response: str, *, num_highlights: Count) -> bool:
    """Check that at least `num_highlights` passages are marked as `*passage*` or `**passage**`, each within a line.

    As published, `***passage***` counts twice.
    """
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    texts = [mark.strip("*") for mark in single] + [mark.removeprefix("**").removesuffix("**") for mark in double]
    return len([text for text in texts if text.strip()]) >= num_highlights


def number_placeholders(response: str, *, num_placeholders: Count) -> bool:
    """Check that there are at least `num_placeholders` placeholders in square brackets, each within a line.

    Empty brackets count.

    >>> number_placeholders("Dear [name], see you on [date].", num_placeholders=2)
    True
    """
    before_brackets = [part for line in response.split("\n") for part in line.split("]")[:-1]]
    return sum("[" in part for part in before_brackets) >= num_placeholders


def postscript(response: str, *, postscript_marker: Annotated[str, AfterValidator(_valid_lowercase_pattern)]) -> bool:
    """Check that the response contains the marker of a postscript, in any case.

    As published, it may be anywhere: not only at the end, or at the beginning of a line.
    """
    marker = postscript_marker.strip()
    if marker in POSTSCRIPTS:
        return re.search(POSTSCRIPTS[marker], response.lower()) is not None
    return is_found(marker.lower(), response.lower(), flags=re.MULTILINE)


def title(response: str) -> bool:
    r"""Check that a line contains a title in double angle brackets.

    >>> title("<<A walk>>\nIt rained.")
    True
    """
    lines = (line[line.find("<<") : line.rfind(">>") + 2] for line in response.split("\n") if "<<" in line)
    return any(found.lstrip("<").rstrip(">").strip() for found in lines if len(found) > len("<<>>"))


def json_format(response: str) -> bool:
    """Check that the whole response is one JSON value, of any type, with or without a Markdown fence around it."""
    text = response.strip()
    for fence in FENCES:  # as published: each is removed once, in this order
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # the second is not caught in the published code: too many nested brackets
        return False
    return True


def constrained_response(response: str) -> bool:
    """Check that the response contains one of `OPTIONS`, letter by letter."""
    return any(option in response for option in OPTIONS)


def two_responses(response: str) -> bool:
    """Check that `******` separates two different texts.

    There may be empty texts before the first and after the last divider.
    """
    parts = [part.strip() for part in response.split("******")]
    texts = [part for part in parts if part]
    return all(parts[1:-1]) and len(texts) == 2 and texts[0] != texts[1]


def repeat_prompt(response: str, *, prompt_to_repeat: Annotated[str, Field(min_length=1)]) -> bool:
    """Check that the response begins with the request, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, *, end_phrase: str) -> bool:
    """Check that the response ends with the phrase, in any case; quotation marks may follow it."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """Check that the whole response is enclosed in straight double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')
