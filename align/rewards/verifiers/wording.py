"""Verifiers of what a response says: its words, letters, case, language and length.

They and those of `layout` give the verdicts of the published IFEval checker (Zhou et al. 2023, google-research
`instruction_following_eval`), its oddities included; each oddity is named where it is. Where the published code draws
a missing setting at random, the setting is required here. Keywords and markers are regular expressions there too.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from align.rewards.verifiers.language import (
    count_sentences,
    count_words,
    detected_language,
    known_languages,
    word_tokens,
)


def compiles(pattern: str) -> str:
    """The pattern itself, where it is one."""
    try:
        re.compile(pattern.strip())
    except re.error as error:
        raise ValueError(f"this is read as a regular expression and is none ({error}); escape it") from error
    return pattern


def _known_language(code: str) -> str:
    if code not in known_languages():
        raise ValueError(f"a language is one of {', '.join(known_languages())}")
    return code


Count = Annotated[int, Field(ge=0)]
Relation = Literal["less than", "at least"]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(compiles)]
Patterns = Annotated[list[Pattern], Field(min_length=1)]


def _holds(count: int, relation: Relation, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def keywords_there(response: str, *, keywords: Patterns) -> bool:
    """Every keyword is found, in any case; inside a longer word counts."""
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


def keyword_frequency(response: str, *, keyword: Pattern, frequency: Count, relation: Relation) -> bool:
    """The keyword is found less than or at least so often, in any case and inside longer words."""
    return _holds(len(re.findall(keyword.strip(), response, re.IGNORECASE)), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: Patterns) -> bool:
    """No forbidden word is found as a word of its own, in any case."""
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(
    response: str,
    *,
    letter: Annotated[str, Field(min_length=1, max_length=1)],
    let_frequency: Count,
    let_relation: Relation,
) -> bool:
    """The character, in either case, is there less than or at least so often.

    A character that is no letter counts as it stands: one published prompt asks for `!`. Forks of the checker that
    draw another letter at random in its place give no verdict on the prompt.
    """
    return _holds(Counter(response.lower())[letter.strip().lower()], let_relation, let_frequency)


def response_language(response: str, *, language: Annotated[str, AfterValidator(_known_language)]) -> bool:
    """The language that langdetect finds is this one; a text in which it finds none passes, as published."""
    return detected_language(response) in (language, None)


def english_capital(response: str) -> bool:
    """There are capitals, no small letters, and the language is English or cannot be told."""
    return response.isupper() and detected_language(response) in ("en", None)


def english_lowercase(response: str) -> bool:
    """There are small letters, no capitals, and the language is English or cannot be told."""
    return response.islower() and detected_language(response) in ("en", None)


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    """Tokens in capitals, such as `I` and `U.S.`, are less than or at least so many; a hyphenated word is one."""
    capitals = sum(token.isupper() for token in word_tokens(response))
    return _holds(capitals, capital_relation, capital_frequency)


def number_sentences(response: str, *, num_sentences: Count, relation: Relation) -> bool:
    """The sentences that Punkt finds are less than or at least so many."""
    return _holds(count_sentences(response), relation, num_sentences)


def number_words(response: str, *, num_words: Count, relation: Relation) -> bool:
    r"""Runs of letters, digits and underscores (`\w+`) are less than or at least so many: `don't` is two."""
    return _holds(count_words(response), relation, num_words)


def no_comma(response: str) -> bool:
    """There is no comma; those of other scripts do not count."""
    return "," not in response
