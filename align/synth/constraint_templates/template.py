"""The form of a constraint template, and settings that are derived from the prompt's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Values to draw from: fixed, or derived from the prompt's text
Options = Sequence[Any] | Callable[[str], Sequence[Any]]


class Template(NamedTuple):
    """A way to express a kind of constraint: wordings with placeholders, and the values to draw for each setting."""

    wordings: tuple[str, ...]
    options: Mapping[str, Options] = {}


# Words that a response may be required to contain
WORDS = [
    *("river", "bridge", "garden", "window", "winter", "morning", "village", "captain", "engine", "mountain", "market"),
    *("letter", "shadow", "silver", "harvest", "compass", "lantern", "journey", "signal", "orchard", "weather"),
    *("kitchen", "teacher", "island", "history", "balance", "library", "painter"),
]
COMMON_WORDS = ["really", "thing", "always"]  # forbidden words for a prompt without a long word
LONG_WORD = 5  # letters; shorter words of a prompt are rarely about its subject


def full_text(text: str) -> list[str]:
    """Return the prompt's whole text, as the only option."""
    return [text]


def prompt_words(text: str) -> list[str]:
    """Return the distinct long words of the prompt in lower case; `COMMON_WORDS` if there are none.

    >>> prompt_words("Describe the Describe garden.")
    ['describe', 'garden']
    """
    found = (word.lower() for word in re.findall(r"\b[A-Za-z]+\b", text) if len(word) >= LONG_WORD)
    return list(dict.fromkeys(found)) or COMMON_WORDS


def prompt_word(text: str) -> list[list[str]]:
    """Return each of `prompt_words` as a list of one."""
    return [[word] for word in prompt_words(text)]


def absent_word(text: str) -> list[list[str]]:
    """Return each of `WORDS` that the prompt does not contain, as a list of one."""
    return [[word] for word in WORDS if word not in text.lower()] or [[word] for word in WORDS]


def absent_word_pairs(text: str) -> list[list[str]]:
    """Return each two adjacent words of `absent_word`."""
    words = absent_word(text)
    return [one + other for one, other in zip(words, [*words[1:], words[0]], strict=True)]
