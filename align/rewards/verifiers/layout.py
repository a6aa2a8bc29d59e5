"""Verifiers of how a response is laid out: its parts, marks, beginning and end. What they agree with: see `wording`."""

from __future__ import annotations

import json
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from align.rewards.verifiers.wording import Count, Pattern, compiles

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")
ENDS_A_WORD = frozenset(".,?!'\"")
POSTSCRIPTS = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}  # the spaces that people put in count not


def _lowered_compiles(marker: str) -> str:
    compiles(marker.lower())
    return marker


def number_paragraphs(response: str, *, num_paragraphs: Count) -> bool:
    """Exactly so many texts stand between the dividers `***`; an empty one is let be at either end only."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    inner = parts[1:-1]
    return all(inner) and len([part for part in parts if part]) == num_paragraphs


def nth_paragraph_first_word(
    response: str, *, num_paragraphs: Count, nth_paragraph: Annotated[int, Field(ge=1)], first_word: str
) -> bool:
    """There are exactly so many paragraphs, set apart by blank lines, and the nth begins with the word.

    As published, empty paragraphs are left out of the number and not out of the order, and the word is read up to the
    first of `.,?!'"`: any other mark is part of it.
    """
    parts = [part.strip() for part in response.split("\n\n")]
    count = len([part for part in parts if part])
    if nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    end = next((place for place, letter in enumerate(word) if letter in ENDS_A_WORD), len(word))
    said = "".join(letter.lower() for letter in word[:end])  # one by one: a last sigma stays what it is, as published
    return count == num_paragraphs and said == first_word.lower()


def multiple_sections(response: str, *, section_spliter: Pattern, num_sections: Count) -> bool:
    """The heading, such as `Section`, is followed by a number at least so often, anywhere in a line."""
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", response)) - 1 >= num_sections


def number_bullet_lists(response: str, *, num_bullets: Count) -> bool:
    """Exactly so many lines begin with `*` or `-`.

    As published, a line of `**bold**` is none, and every line that begins with a dash is one: so is a rule `---`.
    """
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(response: str, *, num_highlights: Count) -> bool:
    """At least so many `*passages*` or `**passages**` of one line are marked; as published, `***both***` are two."""
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    texts = [mark.strip("*") for mark in single] + [mark.removeprefix("**").removesuffix("**") for mark in double]
    return len([text for text in texts if text.strip()]) >= num_highlights


def number_placeholders(response: str, *, num_placeholders: Count) -> bool:
    """At least so many `[placeholders]` stand in the text, each within a line; empty brackets count."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: Annotated[str, AfterValidator(_lowered_compiles)]) -> bool:
    """The marker is somewhere in the text, in any case: as published, not only at the end or at a line's beginning."""
    marker = postscript_marker.strip()
    pattern = POSTSCRIPTS.get(marker, rf"\s*{marker.lower()}.*$")
    return re.search(pattern, response.lower(), re.MULTILINE) is not None


def title(response: str) -> bool:
    """One line holds a text in double angular brackets, `<<like this>>`."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", response))


def json_format(response: str) -> bool:
    """The whole response is a JSON value, of any type, with or without a Markdown fence around it."""
    text = response.strip()
    for fence in FENCES:  # as published: each is taken off once, in this order
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # the second is ours: brackets nested too deep for Python to follow
        return False
    return True


def constrained_response(response: str) -> bool:
    """One of the three answers is somewhere in the text, letter by letter."""
    return any(option in response for option in OPTIONS)


def two_responses(response: str) -> bool:
    """`******` stands between two different texts; an empty one is let be at either end only."""
    parts = [part.strip() for part in response.split("******")]
    texts = [part for part in parts if part]
    return all(parts[1:-1]) and len(texts) == 2 and texts[0] != texts[1]


def repeat_prompt(response: str, *, prompt_to_repeat: Annotated[str, Field(min_length=1)]) -> bool:
    """The response begins with the request, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, *, end_phrase: str) -> bool:
    """The response ends with the phrase, in any case; quotation marks after it are let be."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """The whole response stands between straight double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')
