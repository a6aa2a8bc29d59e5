"""How each kind of instruction of `verifiers` is asked for: wordings, and the settings that are drawn for them.

Counts suit answers of some fifty words, which a small model and a small budget of tokens can give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Options = Sequence[Any] | Callable[[str], Sequence[Any]]  # to draw from, for any prompt or made from this prompt's text


class Template(NamedTuple):
    """One way to ask for a kind of instruction: wordings that name its settings, and the settings' options."""

    wordings: tuple[str, ...]
    options: Mapping[str, Options] = {}


# What a prompt may be asked to be answered with.
WORDS = [
    *("river", "bridge", "garden", "window", "winter", "morning", "village", "captain", "engine", "mountain", "market"),
    *("letter", "shadow", "silver", "harvest", "compass", "lantern", "journey", "signal", "orchard", "weather"),
    *("kitchen", "teacher", "island", "history", "balance", "library", "painter"),
]
COMMON_WORDS = ["really", "thing", "always"]  # to be ruled out where a prompt has no word of its own
LONG_WORD = 5  # letters from which a word of the prompt is taken to be about something
OPENERS = ("Perhaps", "Today", "Still", "Often", "Clearly", "Imagine")
ENDINGS = (
    *("I hope this helps.", "That is all for now.", "Let me know what you think."),
    *("Do you have any other questions?", "And that is the whole story."),
)
RARE_LETTERS, COMMON_LETTERS = "jkqxz", "bfgmpvwy"
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}


def itself(text: str) -> list[str]:
    """The prompt."""
    return [text]


def own_words(text: str) -> list[str]:
    """The longer words of the prompt in small letters; COMMON_WORDS where it has none."""
    found = (word.lower() for word in re.findall(r"\b[A-Za-z]+\b", text) if len(word) >= LONG_WORD)
    return list(dict.fromkeys(found)) or COMMON_WORDS


def own_word(text: str) -> list[list[str]]:
    """Each of `own_words`, as a list of one."""
    return [[word] for word in own_words(text)]


def other_word(text: str) -> list[list[str]]:
    """Each of WORDS that the prompt has not, as a list of one."""
    return [[word] for word in WORDS if word not in text.lower()] or [[word] for word in WORDS]


def other_words(text: str) -> list[list[str]]:
    """Every two neighbours of `other_word`."""
    words = other_word(text)
    return [one + other for one, other in zip(words, [*words[1:], words[0]], strict=True)]


TEMPLATES: dict[str, tuple[Template, ...]] = {
    "change_case:capital_word_frequency": (
        Template(
            (
                "Put at least {capital_frequency} words in capital letters.",
                "Write {capital_frequency} or more words entirely in CAPITALS, for emphasis.",
            ),
            {"capital_frequency": (2, 3, 4), "capital_relation": ("at least",)},
        ),
        Template(
            ("Write fewer than {capital_frequency} words in all capital letters.",),
            {"capital_frequency": (2, 3), "capital_relation": ("less than",)},
        ),
    ),
    "change_case:english_capital": (
        Template(
            (
                "Write your whole answer in English and in capital letters only.",
                "Use nothing but CAPITAL LETTERS, in English.",
                "Answer in English, with every letter in upper case.",
            )
        ),
    ),
    "change_case:english_lowercase": (
        Template(
            (
                "Write your whole answer in English and in lowercase letters; no capitals at all.",
                "Use only small letters, in English, even at the start of a sentence.",
                "Answer in English, with every letter in lower case.",
            )
        ),
    ),
    "combination:repeat_prompt": (
        Template(
            (
                "Before you answer, repeat the request above word for word.",
                "First copy the request above exactly as it is, and then answer it.",
            ),
            {"prompt_to_repeat": itself},
        ),
    ),
    "combination:two_responses": (
        Template(
            (
                "Give two different responses, separated by six asterisks: ******",
                "Answer twice, in two different ways, with a line of ****** between the two answers.",
            )
        ),
    ),
    "detectable_content:number_placeholders": (
        Template(
            (
                "Include at least {num_placeholders} placeholders in square brackets, such as [name].",
                "Leave {num_placeholders} or more things to be filled in, each in square brackets, like [address].",
            ),
            {"num_placeholders": (1, 2, 3)},
        ),
    ),
    "detectable_content:postscript": (
        Template(
            (
                "At the end, add a postscript that starts with {postscript_marker}",
                "Close with a postscript, introduced by {postscript_marker}",
            ),
            {"postscript_marker": ("P.S.", "P.P.S")},
        ),
    ),
    "detectable_format:constrained_response": (
        Template(
            (
                "Answer with one of these three: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
                "Reply with exactly one of the following: My answer is yes. / My answer is no. / My answer is maybe.",
            )
        ),
    ),
    "detectable_format:json_format": (
        Template(
            (
                "Give the whole answer as JSON.",
                "Format your entire output as one valid JSON value; a Markdown code block around it is fine.",
            )
        ),
    ),
    "detectable_format:multiple_sections": (
        Template(
            (
                "Divide your answer into {num_sections} sections, headed {section_spliter} 1, {section_spliter} 2 ...",
                "Give the answer {num_sections} numbered parts; begin each with {section_spliter} X, X its number.",
            ),
            {"num_sections": (2, 3), "section_spliter": ("Section", "Part", "SECTION")},
        ),
    ),
    "detectable_format:number_bullet_lists": (
        Template(
            (
                "Answer with exactly {num_bullets} bullet points, lines that begin with an asterisk: * like this",
                "Use exactly {num_bullets} Markdown bullet points (* such as this one).",
                "Your answer has {num_bullets} bullet points, no more and no fewer, and each begins with '* '.",
            ),
            {"num_bullets": (2, 3, 4)},
        ),
    ),
    "detectable_format:number_highlighted_sections": (
        Template(
            (
                "Highlight at least {num_highlights} passages with asterisks, *like this*.",
                "Mark {num_highlights} or more parts of your answer in Markdown, for example *an important part*.",
            ),
            {"num_highlights": (1, 2, 3)},
        ),
    ),
    "detectable_format:title": (
        Template(
            (
                "Give your answer a title in double angular brackets, such as <<a good day>>.",
                *("Begin with a title, wrapped in << and >>.", "Include a title of the form <<title>>."),
            )
        ),
    ),
    "keywords:existence": (
        Template(
            ("Include the words {keywords}.", "Work the words {keywords} into your answer."), {"keywords": other_words}
        ),
        Template(
            ("Include the word {keywords}.", "Use the word {keywords} somewhere in your answer."),
            {"keywords": other_word},
        ),
    ),
    "keywords:forbidden_words": (
        Template(
            (
                "Do not use the word {forbidden_words}.",
                "Answer without the word {forbidden_words}.",
                "The word {forbidden_words} must not appear in your answer.",
            ),
            {"forbidden_words": own_word},
        ),
    ),
    "keywords:frequency": (
        Template(
            (
                "Use the word '{keyword}' at least {frequency} times.",
                "The word '{keyword}' should appear {frequency} or more times in your answer.",
            ),
            {"keyword": own_words, "frequency": (2, 3), "relation": ("at least",)},
        ),
        Template(
            ("Use the word '{keyword}' fewer than {frequency} times.",),
            {"keyword": own_words, "frequency": (2, 3), "relation": ("less than",)},
        ),
    ),
    "keywords:letter_frequency": (
        Template(
            (
                "Let the letter {letter} appear at least {let_frequency} times.",
                "Use the letter '{letter}' {let_frequency} or more times.",
            ),
            {"letter": tuple(RARE_LETTERS), "let_frequency": (1, 2, 3), "let_relation": ("at least",)},
        ),
        Template(
            (
                "Use the letter {letter} fewer than {let_frequency} times.",
                "The letter '{letter}' should appear less than {let_frequency} times.",
            ),
            {"letter": tuple(COMMON_LETTERS), "let_frequency": (3, 4, 5), "let_relation": ("less than",)},
        ),
    ),
    "language:response_language": tuple(
        Template((f"Answer in {name} only.", f"Write your entire answer in {name}."), {"language": (code,)})
        for code, name in LANGUAGES.items()
    ),
    "length_constraints:nth_paragraph_first_word": (
        Template(
            (
                "Write {num_paragraphs} paragraphs with a blank line between them. Number {nth_paragraph} begins with "
                "the word '{first_word}'.",
                "Your answer has exactly {num_paragraphs} paragraphs, set apart by blank lines, and the first word of "
                "paragraph {nth_paragraph} is '{first_word}'.",
            ),
            {"num_paragraphs": (2, 3), "nth_paragraph": (1, 2), "first_word": OPENERS},
        ),
    ),
    "length_constraints:number_paragraphs": (
        Template(
            (
                "Write exactly {num_paragraphs} paragraphs, separated by the divider ***",
                "Your answer consists of {num_paragraphs} paragraphs; put *** between one and the next.",
            ),
            {"num_paragraphs": (2, 3)},
        ),
    ),
    "length_constraints:number_sentences": (
        Template(
            (
                "Use fewer than {num_sentences} sentences.",
                "Your answer should have less than {num_sentences} sentences.",
            ),
            {"num_sentences": (3, 4, 5), "relation": ("less than",)},
        ),
        Template(
            ("Use at least {num_sentences} sentences.", "Write {num_sentences} sentences or more."),
            {"num_sentences": (3, 4), "relation": ("at least",)},
        ),
    ),
    "length_constraints:number_words": (
        Template(
            (
                *("Use fewer than {num_words} words.", "Answer in less than {num_words} words."),
                "Keep it short: less than {num_words} words.",
            ),
            {"num_words": (20, 30, 40, 50), "relation": ("less than",)},
        ),
        Template(
            ("Use at least {num_words} words.", "Answer in {num_words} words or more."),
            {"num_words": (30, 40, 50), "relation": ("at least",)},
        ),
    ),
    "punctuation:no_comma": (
        Template(("Do not use any commas.", "Write without a single comma.", "Your answer must not contain commas.")),
    ),
    "startend:end_checker": (
        Template(
            (
                "End with exactly this phrase and nothing after it: {end_phrase}",
                "The very last words of your answer must be: {end_phrase}",
            ),
            {"end_phrase": ENDINGS},
        ),
    ),
    "startend:quotation": (
        Template(("Wrap your whole answer in double quotation marks.", "Put double quotation marks around it all.")),
    ),
}
