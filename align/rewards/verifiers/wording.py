"""Verifiers of a response's words, letters, case, language and length.

They and those of `layout` give the verdicts of the published IFEval checker (Zhou et al. 2023, google-research
`instruction_following_eval`), including its oddities, each of which is noted where it occurs. Where the published code
draws a missing setting at random, the setting is required here. Keywords and markers are regular expressions, as there,
searched in limited time (`patterns`).
"""

from __future__ import annotations

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
from align.rewards.verifiers.patterns import count_found, is_found, valid_pattern


def _known_language(code: str) -> str:
    if code not in known_languages():
        raise ValueError(f"a language is one of {', '.join(known_languages())}")
    return code


Count = Annotated[int, Field(ge=0)]
Relation = Literal["less than", "at least"]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(valid_pattern)]
Patterns = Annotated[list[Pattern], Field(min_length=1)]


def _compare(count: int, relation: Relation, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def keywords_exist(response: str, *, keywords: Patterns) -> bool:
    """Check that every keyword occurs, in any case; also inside a longer word.

    >>> keywords_exist("The seaside", keywords=["sea", "the"])
    True
    """
    return all(is_found(keyword, response) for keyword in keywords)


def keyword_frequency(response: str, *, keyword: Pattern, frequency: Count, relation: Relation) -> bool:
    """Check how often the keyword occurs, in any case and also inside longer words.

    >>> keyword_frequency("sea, seaside", keyword="sea", frequency=2, relation="at least")
    True
    """
    return _compare(count_found(keyword.strip(), response), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: Patterns) -> bool:
    """Check that no forbidden word occurs as a whole word, in any case.

    >>> forbidden_words("The seaside", forbidden_words=["sea"])
    True
    """
    return not any(is_found(word, response, around=(r"\b", r"\b")) for word in forbidden_words)


def letter_frequency(
    response: str,
    *,
    letter: Annotated[str, Field(min_length=1, max_length=1)],
    let_frequency: Count,
    let_relation: Relation,
) -> bool:
    """Check how often a character occurs, in either case.

    It need not be a letter: one published prompt asks for `!`. Forks of the checker that draw a random letter instead
    give no verdict on that prompt.
    """
    return _compare(Counter(response.lower())[letter.strip().lower()], let_relation, let_frequency)


def response_language(response: str, *, language: Annotated[str, AfterValidator(_known_language)]) -> bool:
    """Check the language that langdetect finds; as published, a text in which it finds none passes."""
    return detected_language(response) in (language, None)


def english_capital(response: str) -> bool:
    """Check that there are capital and no lowercase letters, and that the language is English or unknown."""
    return response.isupper() and detected_language(response) in ("en", None)


def english_lowercase(response: str) -> bool:
    """Check that there are lowercase and no capital letters, and that the language is English or unknown."""
    return response.islower() and detected_language(response) in ("en", None)


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    """Check the number of words in capitals, such as `I` and `U.S.`; a hyphenated word is one."""
    capitals = sum(token.isupper() for token in word_tokens(response))
    return _compare(capitals, capital_relation, capital_frequency)


def number_sentences(response: str, *, num_sentences: Count, relation: Relation) -> bool:
    """Check the number of sentences that NLTK's Punkt model finds."""
    return _compare(count_sentences(response), relation, num_sentences)


def number_words(response: str, *, num_words: Count, relation: Relation) -> bool:
    r"""Check the number of words: runs of letters, digits and underscores (`\w+`), so that `don't` is two.

    >>> number_words("I don't", num_words=3, relation="at least")
    True
    """
    return _compare(count_words(response), relation, num_words)


def no_comma(response: str) -> bool:
    """Check that there is no comma; those of other scripts are allowed.

    >>> no_comma("Yes, of course"), no_comma("好，谢谢")
    (False, True)
    """
    return "," not in response
