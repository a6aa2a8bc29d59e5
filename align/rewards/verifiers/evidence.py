"""The parts of a response that an instruction is about, to be marked where people read the response."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_PARTS = 30  # distinct texts to mark

Kwargs = Mapping[str, Any]


def _pattern(pattern: str, flags: int = 0) -> Callable[[str, Kwargs], list[str]]:
    compiled = re.compile(pattern, flags)
    return lambda response, kwargs: [match[0] for match in compiled.finditer(response)]


def _words(key: str) -> Callable[[str, Kwargs], list[str]]:
    """Return the texts in a response that are one of the words of `kwargs[key]`, in any case."""

    def find(response: str, kwargs: Kwargs) -> list[str]:
        given = kwargs.get(key) or ()
        words: Sequence[Any] = [given] if isinstance(given, str) else given
        return [
            match[0] for word in words if word for match in re.finditer(re.escape(str(word)), response, re.IGNORECASE)
        ]

    return find


EVIDENCE: Mapping[str, Callable[[str, Kwargs], list[str]]] = {
    "change_case:capital_word_frequency": _pattern(r"\b[A-Z]{2,}\b"),
    "change_case:english_capital": _pattern(r"\b\w*[a-z]\w*\b"),
    "change_case:english_lowercase": _pattern(r"\b\w*[A-Z]\w*\b"),
    "detectable_content:number_placeholders": _pattern(r"\[[^\[\]\n]*\]"),
    "detectable_content:postscript": _words("postscript_marker"),
    "detectable_format:number_bullet_lists": _pattern(r"^\s*[*-]\s.*$", re.MULTILINE),
    "detectable_format:number_highlighted_sections": _pattern(r"\*[^\n*]+\*"),
    "detectable_format:title": _pattern(r"<<[^\n]+?>>"),
    "keywords:existence": _words("keywords"),
    "keywords:forbidden_words": _words("forbidden_words"),
    "keywords:frequency": _words("keyword"),
    "punctuation:no_comma": _pattern(","),
    "startend:end_checker": _words("end_phrase"),
}


def evidence(name: str, kwargs: Kwargs, response: str) -> tuple[str, ...]:
    """Return the distinct texts in a response that an instruction is about; none for one about the whole response.

    Whether they are violations or what was asked for is up to the verdict on the instruction.

    >>> evidence("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "The Sea, the sea.")
    ('Sea', 'sea')
    """
    find = EVIDENCE.get(name)
    return () if find is None else tuple(dict.fromkeys(find(response, kwargs)))[:MAX_PARTS]
