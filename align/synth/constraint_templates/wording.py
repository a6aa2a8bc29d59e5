"""Templates for the wording of a response: its words, letters, case, language and punctuation."""

from __future__ import annotations

from align.synth.constraint_templates.template import (
    Template,
    absent_word,
    absent_word_pairs,
    prompt_word,
    prompt_words,
)

RARE_LETTERS, COMMON_LETTERS = "jkqxz", "bfgmpvwy"
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}

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
    "keywords:existence": (
        Template(
            ("Include the words {keywords}.", "Work the words {keywords} into your answer."),
            {"keywords": absent_word_pairs},
        ),
        Template(
            ("Include the word {keywords}.", "Use the word {keywords} somewhere in your answer."),
            {"keywords": absent_word},
        ),
    ),
    "keywords:forbidden_words": (
        Template(
            (
                "Do not use the word {forbidden_words}.",
                "Answer without the word {forbidden_words}.",
                "The word {forbidden_words} must not appear in your answer.",
            ),
            {"forbidden_words": prompt_word},
        ),
    ),
    "keywords:frequency": (
        Template(
            (
                "Use the word '{keyword}' at least {frequency} times.",
                "The word '{keyword}' should appear {frequency} or more times in your answer.",
            ),
            {"keyword": prompt_words, "frequency": (2, 3), "relation": ("at least",)},
        ),
        Template(
            ("Use the word '{keyword}' fewer than {frequency} times.",),
            {"keyword": prompt_words, "frequency": (2, 3), "relation": ("less than",)},
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
    "punctuation:no_comma": (
        Template(("Do not use any commas.", "Write without a single comma.", "Your answer must not contain commas.")),
    ),
}
