"""Verifiers: manual cases from the published semantics of IFEval, its oddities, and invalid instructions."""

import subprocess
import sys

import langdetect
import pytest

from align.errors import InputError
from align.rewards.verifiers import language
from align.rewards.verifiers.instructions import VERIFIERS, follows, instructions, with_custom

try:
    language.count_sentences("One.")
except InputError as absent:
    NO_PUNKT = str(absent)
else:
    NO_PUNKT = ""
BY_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}

LESS, LEAST = "less than", "at least"
GERMAN = "Das ist ein ganz gewöhnlicher Satz, und er ist auf Deutsch geschrieben."
ENGLISH = "this is a perfectly ordinary sentence and it is written in the english language"

# kind -> (settings, response, is it followed?)
CASES = {
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 2, "capital_relation": LEAST}, "The NASA and the U.S. agree.", True),
        ({"capital_frequency": 3, "capital_relation": LEAST}, "The NASA and the U.S. agree.", False),
        ({"capital_frequency": 1, "capital_relation": LESS}, "Nobody shouts.", True),
        ({"capital_frequency": 1, "capital_relation": LESS}, "I shout.", False),  # `I` is a word in capitals
        ({"capital_frequency": 1, "capital_relation": LEAST}, "WELL-KNOWN", True),
        ({"capital_frequency": 2, "capital_relation": LEAST}, "WELL-KNOWN", False),  # a hyphenated word is one
        ({"capital_frequency": 2, "capital_relation": LEAST}, "CANNOT", True),  # the treebank's `CAN`, `NOT`
        ({"capital_frequency": 0, "capital_relation": LEAST}, "none", True),
    ],
    "change_case:english_capital": [
        ({}, ENGLISH.upper(), True),
        ({}, ENGLISH.capitalize(), False),
        ({}, GERMAN.upper(), False),
        ({}, "1234", False),  # no capitals
        ({}, "Ⅷ 12", True),  # capitals, and no language is detected
    ],
    "change_case:english_lowercase": [
        ({}, ENGLISH, True),
        ({}, ENGLISH.capitalize(), False),
        ({}, GERMAN.lower(), False),
        ({}, "1234", False),
        ({}, "ⅷ 12", True),
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Write a poem. "}, " WRITE A POEM. Roses are red.", True),
        ({"prompt_to_repeat": "Write a poem."}, "Sure! Write a poem.", False),
    ],
    "combination:two_responses": [
        ({}, "yes ****** no", True),
        ({}, "******\nyes\n******\nno\n******", True),  # empty texts at both ends are allowed
        ({}, "yes ****** yes ", False),
        ({}, "yes", False),
        ({}, "a ****** b ****** c", False),
        ({}, "a ****** ****** b", False),  # an empty one between
        ({}, "a*******b", True),  # the seventh asterisk belongs to the second
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, "Dear [name], of [address]", True),
        ({"num_placeholders": 3}, "Dear [name], of [address]", False),
        ({"num_placeholders": 1}, "[]", True),
        ({"num_placeholders": 1}, "[two\nlines]", False),
        ({"num_placeholders": 2}, "[[nested]]", False),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, "Bye.\nP.S. More.", True),
        ({"postscript_marker": "P.S."}, "Bye. p. s. more", True),
        ({"postscript_marker": "P.S."}, "Bye. PS: more", False),
        ({"postscript_marker": "P.S."}, "Bye. P.S more", False),
        ({"postscript_marker": "P.P.S"}, "p. p. s more", True),
        ({"postscript_marker": "P.P.S"}, "P.S. more", False),
        ({"postscript_marker": " Note: "}, "A NOTE: this", True),
        ({"postscript_marker": "P.P.S."}, "P.P.S more", True),  # read as a pattern: `.` is any letter
    ],
    "detectable_format:constrained_response": [
        ({}, "Well. My answer is maybe. Or not.", True),
        ({}, "my answer is yes.", False),
        ({}, "My answer is yes", False),
    ],
    "detectable_format:json_format": [
        ({}, '{"a": [1, null]}', True),
        ({}, '```json\n{"a": 1}\n```', True),
        ({}, "```JSON\n[1]```", True),
        ({}, "```\n7\n```", True),  # any value is JSON
        ({}, "{'a': 1}", False),
        ({}, 'Here it is: {"a": 1}', False),
        ({}, "```python\n1\n```", False),
        ({}, "[" * 100_000, False),
    ],
    "detectable_format:multiple_sections": [
        ({"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\nx\nSECTION 2\ny", True),
        ({"section_spliter": "SECTION", "num_sections": 3}, "SECTION 1\nx\nSECTION 2\ny", False),
        ({"section_spliter": "SECTION", "num_sections": 1}, "Section 1", False),
        ({"section_spliter": "Day", "num_sections": 1}, "on Day12x", True),
        ({"section_spliter": "Day", "num_sections": 1}, "Day one", False),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, "* one\n  - two\nthree", True),
        ({"num_bullets": 1}, "* one\n  - two\nthree", False),
        ({"num_bullets": 0}, "**bold** line", True),
        ({"num_bullets": 1}, "---", True),  # a rule counts
        ({"num_bullets": 0}, "+ one\n1. two", True),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, "*one* and *two*", True),
        ({"num_highlights": 3}, "*one* and *two*", False),
        ({"num_highlights": 1}, "**bold**", True),
        ({"num_highlights": 2}, "**bold**", False),
        ({"num_highlights": 1}, "** ** and *a\nb", False),
        ({"num_highlights": 2}, "**a** **b**", True),
        ({"num_highlights": 3}, "**a** *b*", False),
        ({"num_highlights": 2}, "***both***", True),  # found both as italic and as bold
    ],
    "detectable_format:title": [
        ({}, "<<A poem>>\nRoses", True),
        ({}, "<< >>", False),
        ({}, "<<a\nb>>", False),
        ({}, "<title>", False),
    ],
    "keywords:existence": [
        ({"keywords": ["art", "moon"]}, "The MOON started.", True),  # in any case, inside words
        ({"keywords": ["art", "sun"]}, "The MOON started.", False),
        ({"keywords": ["a.c"]}, "abc", True),  # patterns
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["art", "sun"]}, "The moon started.", True),
        ({"forbidden_words": ["art", "sun"]}, "Under the SUN.", False),
    ],
    "keywords:frequency": [
        ({"keyword": "ha", "frequency": 3, "relation": LEAST}, "Haha, that ha", True),
        ({"keyword": "ha", "frequency": 5, "relation": LEAST}, "Haha, that ha", False),
        ({"keyword": " ha ", "frequency": 4, "relation": LESS}, "Haha, that", True),
        ({"keyword": "ha", "frequency": 3, "relation": LESS}, "Haha, that", False),
    ],
    "keywords:letter_frequency": [
        ({"letter": "A", "let_frequency": 2, "let_relation": LEAST}, "Aha", True),
        ({"letter": "a", "let_frequency": 2, "let_relation": LESS}, "Aha", False),
        ({"letter": "!", "let_frequency": 2, "let_relation": LEAST}, "Oh! No!", True),
        ({"letter": "!", "let_frequency": 3, "let_relation": LEAST}, "Oh! No!", False),
    ],
    "language:response_language": [
        ({"language": "de"}, GERMAN, True),
        ({"language": "en"}, GERMAN, False),
        ({"language": "ja"}, "1234 !", True),  # no language is detected
    ],
    "length_constraints:nth_paragraph_first_word": [
        ({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Moon"}, 'a\n\n"moon\'s" light', True),
        ({"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "moon"}, "a\n\nmoon", False),
        ({"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "moon"}, "a\n\nmoon", False),
        ({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "moon"}, "a\n\n\n\nmoon", False),  # the 2nd is empty
        ({"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "moon"}, "moon: x", False),  # the colon is of the word
        ({"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "moon"}, "moon", False),  # can never be followed
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, "a\n***\nb", True),
        ({"num_paragraphs": 2}, "***\na\n***\nb\n***", True),
        ({"num_paragraphs": 2}, "a\n\nb", False),
        ({"num_paragraphs": 2}, "a\n***\n\n***\nb", False),  # an empty one between
        ({"num_paragraphs": 1}, "a\n* * *\nb", True),  # another divider is none
    ],
    "length_constraints:number_sentences": [
        ({"num_sentences": 2, "relation": LEAST}, "Dr. Who left. He came back.", True),
        ({"num_sentences": 3, "relation": LEAST}, "Dr. Who left. He came back.", False),
        ({"num_sentences": 3, "relation": LESS}, "Dr. Who left. He came back.", True),
        ({"num_sentences": 2, "relation": LESS}, "Really? No!", False),
        ({"num_sentences": 2, "relation": LESS}, "One\ntwo\nthree", True),  # lines are no sentences
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, "relation": LEAST}, "I don't", True),  # I, don, t
        ({"num_words": 3, "relation": LESS}, "I don't", False),
        ({"num_words": 2, "relation": LESS}, "snake_case", True),
    ],
    "punctuation:no_comma": [({}, "a; b", True), ({}, "a, b", False), ({}, "a，b", True)],
    "startend:end_checker": [
        ({"end_phrase": "The End."}, 'And so. "the end."\n', True),
        ({"end_phrase": " The end. "}, "the END.", True),
        ({"end_phrase": "The end."}, "The end. Bye", False),
    ],
    "startend:quotation": [
        ({}, ' "all of it" \n', True),
        ({}, '"', False),
        ({}, '"all" of it', False),
        ({}, "“all of it”", False),
    ],
}
# followed loosely and not strictly: (kind, settings, response, what is dropped)
LOOSE = [
    ("startend:quotation", {}, 'Sure:\n"all of it"', "the first line"),
    ("startend:end_checker", {"end_phrase": "The end."}, "It is.\nThe end.\nAnything else?", "the last line"),
    ("detectable_format:json_format", {}, "Here:\n[1]\nBye", "both lines"),
    ("detectable_format:constrained_response", {}, "My answer is **no**.", "asterisks"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "Sure!\n**Say** it", "the first line and asterisks"),
    ("startend:quotation", {}, 'Sure:\n"**all"**\nBye', "both lines and asterisks"),
]


def asked(kind, settings):
    return {"instructions": [{"id": kind, "kwargs": settings}]}


@pytest.mark.parametrize("kind", VERIFIERS)
def test_each_verifier_follows_the_published_semantics(kind):
    if kind in BY_PUNKT and NO_PUNKT:
        pytest.skip(NO_PUNKT)
    for settings, response, followed in CASES[kind]:
        assert follows(asked(kind, settings), response) == [followed], (settings, response)
    assert {followed for *_, followed in CASES[kind]} == {True, False}
    print(f"covered {len(CASES[kind])} cases")


def test_the_cases_cover_the_table():
    assert CASES.keys() == VERIFIERS.keys()
    assert len(VERIFIERS) == 25


@pytest.mark.parametrize(("kind", "settings", "response", "dropped"), LOOSE)
def test_the_loose_check_ignores_first_and_last_lines_and_asterisks(kind, settings, response, dropped):
    assert follows(asked(kind, settings), response) == [False], dropped
    assert follows(asked(kind, settings), response, loose=True) == [True], dropped


@pytest.mark.parametrize("kind", VERIFIERS)
def test_an_empty_response_follows_no_instruction(kind):
    settings = CASES[kind][0][0]
    for response in ("", " \n\t ", "\n"):
        assert (
            follows(asked(kind, settings), response) == follows(asked(kind, settings), response, loose=True) == [False]
        )


def test_an_empty_loose_version_follows_no_instruction():
    assert follows(asked("punctuation:no_comma", {}), "a, b", loose=True) == [False]


def test_both_formats_of_instructions_are_equivalent():
    names = ["punctuation:no_comma", "length_constraints:number_words", "startend:quotation"]
    hub = {
        "num_words": 2.0,
        "relation": LEAST,
        "keywords": None,
        "letter": None,
    }  # every column, as the hub's table has
    row = {"key": 1, "instruction_id_list": names, "kwargs": [{}, hub, {"relation": None}]}
    own = {"instructions": [{"id": names[0]}, {"id": names[1], "kwargs": hub}, {"id": names[2], "kwargs": None}]}
    for response, verdicts in (("a b", [True, True, False]), ('"a, b"', [False, True, True])):
        assert follows(row, response) == follows(own, response) == verdicts
    assert follows({}, "a b") == []


BAD = [
    (asked("keywords:existance", {}), "did you mean 'keywords:existence'"),
    (asked("startend:quotation", {"num_words": 3}), "startend:quotation.num_words: unknown key"),
    (asked("length_constraints:number_words", {"num_word": 3}), "did you mean 'num_words'"),
    (asked("length_constraints:number_words", {"num_words": 3}), "relation: this key is required"),
    (
        asked("length_constraints:number_words", {"num_words": None, "relation": LESS}),
        "num_words: this key is required",
    ),
    (
        asked("length_constraints:number_words", {"num_words": -1, "relation": LESS}),
        "num_words: Input should be greater",
    ),
    (
        asked("length_constraints:number_words", {"num_words": 2.5, "relation": LESS}),
        "num_words: Input should be a valid",
    ),
    (asked("length_constraints:number_words", {"num_words": 3, "relation": "at most"}), "'less than' or 'at least'"),
    (asked("keywords:existence", {"keywords": ["C("]}), "not a valid regular expression"),
    (asked("keywords:existence", {"keywords": []}), "keywords: List should have at least 1 item"),
    (asked("keywords:existence", {"keywords": "moon"}), "keywords: Input should be a valid"),
    (asked("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": LESS}), "at most 1 char"),
    (asked("language:response_language", {"language": "zh"}), "zh-cn, zh-tw (got 'zh')"),
    (asked("combination:repeat_prompt", {"prompt_to_repeat": ""}), "at least 1 character"),
    ({"instructions": ["startend:quotation"]}, "an instruction must be"),
    ({"instructions": [{"id": "startend:quotation", "settings": {}}]}, "an instruction must be"),
    ({"instruction_id_list": ["startend:quotation"], "kwargs": []}, "two lists of equal length"),
    ({"instruction_id_list": ["startend:quotation"]}, "two lists of equal length"),
    (
        asked("subprocess:getoutput", {}),
        "no verifier is called 'subprocess:getoutput'",
    ),  # a row runs no code of its choice
]


@pytest.mark.parametrize(("metadata", "message"), BAD, ids=str)
def test_an_invalid_instruction_is_rejected_in_one_line_for_any_response(metadata, message):
    for response in ("a response", ""):
        with pytest.raises(InputError) as refused:
            follows(metadata, response)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


def shouts(response: str, *, times: int = 1) -> bool:
    return response.count("!") >= times


def test_a_custom_verifier_is_imported_by_path_under_a_new_name():
    table = with_custom({"my:shouts": f"{__name__}:shouts"})
    row = {"instructions": [{"id": "my:shouts", "kwargs": {"times": 2}}, {"id": "my:shouts"}]}
    assert [each.followed("Oh! No") for each in instructions(row, table)] == [False, True]
    with pytest.raises(InputError, match="times: Input should be a valid integer"):
        instructions(asked("my:shouts", {"times": "2"}), table)
    with pytest.raises(InputError, match="startend:quotation: this is the name of a built-in verifier"):
        with_custom({"startend:quotation": f"{__name__}:shouts"})
    with pytest.raises(InputError, match="cannot be imported"):
        with_custom({"my:other": f"{__name__}:other"})


def test_language_detection_is_deterministic_and_leaves_the_global_seed():
    unsure = "no taxi hotel"
    assert len({language.detected_language(unsure) for _ in range(30)}) == 1
    assert len({langdetect.detect(unsure) for _ in range(200)}) > 1, "the text is not unsure enough to show it"
    assert langdetect.DetectorFactory.seed is None


def test_sentences_are_not_counted_without_the_punkt_model():
    row = asked("length_constraints:number_sentences", {"num_sentences": 1, "relation": LEAST})
    code = f"""
import importlib.metadata as metadata
from nltk.data import path
def none(name): raise metadata.PackageNotFoundError(name)
path[:], metadata.distribution = [], none
from align.rewards.verifiers.instructions import follows
follows({row}, "One. Two.")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "InputError: NLTK's punkt_tab, which counts sentences, is not installed: pip install" in ran.stderr
