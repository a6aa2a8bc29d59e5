"""Whether two similar prompts ask for the same task.

Similarity of words or embeddings does not tell a question from its negation, or a problem from the same one with other
numbers: all of these have a cosine over 0.9. Two prompts count as the same task only if `task_features` are equal.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from align.rewards.answers.number_words import SCALES, TENS, UNITS, VALUES, with_digits

NUMBER = re.compile(rf"\d+(?:[.,]\d+)*|\b(?:{'|'.join(UNITS)})\b")
DIGIT = re.compile(r"\d")
UNIT_WORDS = frozenset(UNITS)
COMPOSED = frozenset({*TENS, *SCALES})
SENTENCE = re.compile(r"[.!?:;]\s+|\n")
SYMBOL = re.compile(r"[+*/^%<>=×÷]|-\s*\d|\s-\s")
EXPRESSION = re.compile(r"\w+(?:\s*(?:[-+*/^%<>×÷]|[<>=!]=|\*\*)\s*\w+)+")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
QUOTES = re.compile(r"[\"“`']")
QUOTED = re.compile(r"\"([^\"\n]{1,200})\"|“([^”\n]{1,200})”|`([^`\n]{1,200})`|(?<!\w)'([^'\n]{1,80})'(?!\w)")


def _classes(table: dict[str, str]) -> dict[str, str]:
    """Return the class of each word, from the words of each class."""
    return {word: name for name, words in table.items() for word in words.split()}


NEGATION_WORDS = (
    "no not never none nothing nobody neither nor without cannot except excluding exclude avoid false wrong lacks "
    "lacking impossible improper incorrect invalid inaccurate incomplete inconsistent inappropriate illegal illogical "
    "irrelevant irrational irregular disagree dislike dislikes disallow disable disprove"
)
NEGATIONS = frozenset(NEGATION_WORDS.split())
UN_WORD = re.compile(r"un(?<!\wun)(?!der|i|til|less|cle|fortunately)[a-z]{4,}")
QUANTIFIERS = _classes(
    {
        "all": "all every each both everyone everything always entire whole",
        "some": "some any several few somebody someone something sometimes",
        "most": "most majority mostly usually often",
        "only": "only just solely exclusively exactly precisely",
        "at least": "least minimum",
        "more": "more greater larger bigger higher longer older above over exceeds",
        "less": "less fewer smaller lower shorter younger below under",
        "largest": "largest greatest biggest highest longest oldest maximum maximal max maximize",
        "smallest": "smallest lowest shortest youngest minimal min minimize fewest",
        "double": "twice double doubled doubles",
        "triple": "thrice triple tripled triples",
        "half": "half halves halved",
        "third": "third thirds",
        "quarter": "quarter quarters fourth",
        "first": "first initial earliest",
        "last": "last final latest",
        "before": "before prior preceding previous",
        "after": "after subsequent next",
    }
)
OPERATORS = _classes(
    {
        "add": "add adds added adding addition sum sums plus",
        "subtract": "subtract subtracts subtracted subtracting subtraction minus difference",
        "multiply": "multiply multiplies multiplied multiplying multiplication product times",
        "divide": "divide divides divided dividing division quotient",
        "remainder": "remainder modulo mod",
        "power": "power squared square cubed cube exponent root",
        "mean": "mean average",
        "median": "median",
        "ascending": "ascending",
        "descending": "descending",
        "reverse": "reverse reversed reverses backwards",
        "even": "even",
        "odd": "odd",
        "encode": "encode encrypt serialize compress",
        "decode": "decode decrypt deserialize decompress",
        "insert": "insert append push",
        "delete": "delete remove pop",
        "union": "union",
        "intersection": "intersection",
        "increase": "increase increases increased increment rise",
        "decrease": "decrease decreases decreased decrement fall",
        "disadvantages": "disadvantages disadvantage cons drawbacks drawback",
        "against": "against oppose opposes opposing",
    }
)
INSTRUCTIONS = _classes(
    {
        "lowercase": "lowercase",
        "uppercase": "uppercase capitals caps",
        "bullets": "bullet bullets bulleted",
        "sections": "section sections",
        "paragraphs": "paragraph paragraphs",
        "sentences": "sentence sentences",
        "words": "word words",
        "letters": "letter letters",
        "lines": "line lines",
        "stanzas": "stanza stanzas verse verses",
        "commas": "comma commas",
        "postscript": "postscript",
        "placeholders": "placeholder placeholders brackets",
        "highlights": "highlight highlighted bold italic italics",
        "poem": "poem rhyme rhymes rhyming haiku sonnet limerick",
        "keywords": "keyword keywords",
        "short": "brief briefly concise concisely short summary summarize summarise",
        "detailed": "detailed elaborate",
        **{word: word for word in ("json", "xml", "yaml", "csv", "html", "markdown", "table", "title", "repeat")},
    }
)
PHRASES = (  # name, a part of each phrase, and the phrases
    ("lowercase", "case", re.compile(r"lower[- ]case")),
    ("lowercase", "small letters", re.compile(r"small letters")),
    ("uppercase", "case", re.compile(r"upper[- ]case")),
    ("uppercase", "capital", re.compile(r"(?:in|all|only|but) capital")),
    ("postscript", "p.", re.compile(r"\bp\.p?\.?s\b")),
    ("quotation", "quot", re.compile(r"(?:quotation|quote) marks?|double quotes")),
    ("two responses", "******", re.compile(r"\*{6}")),
    ("steps", "step", re.compile(r"step[- ]by[- ]step")),
)
CODE = (
    "Python JavaScript TypeScript Java Kotlin Scala Swift Rust Go Golang Ruby PHP Perl Haskell Lua Julia MATLAB SQL "
    "MySQL PostgreSQL SQLite MongoDB Bash PowerShell Fortran COBOL Erlang Elixir Clojure OCaml Dart Groovy Assembly "
    "CSS React Angular Vue Django Flask jQuery pandas numpy regex"
)
SPOKEN = (
    "English French German Spanish Italian Portuguese Dutch Russian Chinese Mandarin Japanese Korean Arabic Hindi "
    "Turkish Polish Greek Latin Hebrew Swedish Danish Norwegian Finnish Czech Hungarian Vietnamese Thai"
)
ALIASES = {"golang": "go", "js": "javascript", "ts": "typescript", "py": "python", "mandarin": "chinese"}
LANGUAGES = frozenset(f"{CODE} {SPOKEN}".lower().split()) - {"go", "regex"} | ALIASES.keys()
SYMBOLIC_LANGUAGE = re.compile(
    r"[CFGR](?<!\w[CFGR])(?:(?<=[CF])(?:\+\+|#)|(?:(?<=[CR])|(?<=G)o)"
    r"(?:(?= (?:code|program|function|language|script))|(?<=\bin \w)(?![\w'’#+-])|(?<=\bin Go)(?![\w'’#+-])))"
)

KNOWN = frozenset({*NEGATIONS, *QUANTIFIERS, *OPERATORS, *INSTRUCTIONS, *LANGUAGES})


class TaskFeatures(NamedTuple):
    """What decides a task and hardly changes the similarity of two prompts. Values are sorted, with repetitions."""

    numbers: tuple[str, ...]  # those of each sentence in their order, for `8 minus 3` is not `3 minus 8`
    operators: tuple[str, ...]  # distinct, of arithmetic and of opposite tasks
    expressions: tuple[str, ...]  # of numbers or names and symbols, as `a < b`
    negations: int
    quantifiers: tuple[str, ...]
    instructions: tuple[str, ...]  # distinct kinds of verifiable instructions, and literals that the prompt quotes
    languages: tuple[str, ...]  # distinct; of code, or spoken


def task_features(text: str) -> TaskFeatures:
    """Return the features of a prompt, of which two prompts of one task have the same.

    >>> task_features("Give three reasons to exercise.").numbers
    ('3',)
    >>> task_features("Is it not safe?") == task_features("Is it safe?")
    False
    """
    lowered = text.lower().replace("’", "'")
    words = WORD.findall(lowered)
    known = [word for word in words if word in KNOWN]
    negations = sum(word in NEGATIONS for word in known) + lowered.count("n't") + len(UN_WORD.findall(lowered))
    return TaskFeatures(
        numbers=tuple(sorted(_numbers(lowered, words))),
        operators=_distinct(OPERATORS[word] for word in known if word in OPERATORS),
        expressions=tuple(sorted(_expressions(lowered))),
        negations=negations,
        quantifiers=tuple(sorted(QUANTIFIERS[word] for word in known if word in QUANTIFIERS)),
        instructions=_distinct(_instructions(lowered, known)),
        languages=_distinct(_languages(text, known)),
    )


def difference(one: TaskFeatures, other: TaskFeatures) -> str:
    """Return the name of the first feature that two prompts differ in; empty if they are one task.

    >>> difference(task_features("Sum two numbers."), task_features("Multiply two numbers."))
    'operators'
    """
    pairs = zip(TaskFeatures._fields, one, other, strict=True)
    return next((name for name, mine, theirs in pairs if mine != theirs), "")


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def _expressions(lowered: str) -> Iterator[str]:
    """Yield the expressions of a text without spaces; no words with hyphens or slashes."""
    if SYMBOL.search(lowered):
        for found in EXPRESSION.findall(lowered):
            if not re.fullmatch(r"[a-z/-]+", found):
                yield "".join(found.split())


def _numbers(lowered: str, words: Collection[str]) -> Iterator[str]:
    """Yield the numbers of each sentence, with number words as digits."""
    if UNIT_WORDS.isdisjoint(words) and COMPOSED.isdisjoint(words) and not DIGIT.search(lowered):
        return
    if not COMPOSED.isdisjoint(words):
        lowered = with_digits(lowered)
    for sentence in SENTENCE.split(lowered):
        if found := NUMBER.findall(sentence):
            yield " ".join(str(VALUES.get(number, number.replace(",", ""))) for number in found)


def _instructions(lowered: str, words: Iterable[str]) -> Iterator[str]:
    yield from (INSTRUCTIONS[word] for word in words if word in INSTRUCTIONS)
    yield from (name for name, part, phrase in PHRASES if part in lowered and phrase.search(lowered))
    if QUOTES.search(lowered):
        yield from (f'"{" ".join("".join(parts).split())}"' for parts in QUOTED.findall(lowered))


def _languages(text: str, words: Iterable[str]) -> Iterator[str]:
    yield from (ALIASES.get(word, word) for word in words if word in LANGUAGES)
    yield from (found.lower() for found in SYMBOLIC_LANGUAGE.findall(text))
