"""Prompts with verifiable instructions: templates, compatibility and splits."""

import json
from collections import Counter
from itertools import combinations

import pytest

from align.config import build
from align.errors import InputError
from align.evaluation.sampled_task import Graded
from align.evaluation.tasks import TASKS
from align.records import Message, Prompt
from align.rewards.judges import load_judge
from align.rewards.verifiers.instructions import VERIFIERS, follows
from align.rewards.verifiers.language import count_sentences
from align.synth.constraint_templates import TEMPLATES
from align.synth.constraints import COMPATIBLE, EXCLUSIVE, SPLITS, are_compatible, constrain, split_of
from align.synth.settings import ConstraintSettings

try:
    count_sentences("One.")
except InputError as absent:
    NO_PUNKT = str(absent)
else:
    NO_PUNKT = ""
BY_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}

LEAST = "at least"
ENGLISH = "this is a perfectly ordinary answer that somebody has written in the english language"
FOREIGN = {
    "de": "Das ist ein ganz gewöhnlicher Satz und er ist auf Deutsch geschrieben.",
    "fr": "Ceci est une phrase tout à fait ordinaire et elle est écrite en français.",
    "es": "Esta es una frase completamente normal y está escrita en español para todos.",
    "it": "Questa è una frase del tutto normale ed è scritta in lingua italiana per tutti.",
}


def often(unit, count, relation, between=" "):
    """A text that contains the unit as often as required, and one that does not."""
    enough, few = (between.join([unit] * number) for number in (count, count - 1))
    return (enough, few or "none of it") if relation == LEAST else (few or "none of it", enough)


# kind -> from its settings a response that follows and one that does not
ANSWERS = {
    "change_case:capital_word_frequency": lambda capital_frequency, capital_relation: often(
        "NASA", capital_frequency, capital_relation
    ),
    "change_case:english_capital": lambda: (ENGLISH.upper(), ENGLISH.capitalize()),
    "change_case:english_lowercase": lambda: (ENGLISH, ENGLISH.capitalize()),
    "combination:repeat_prompt": lambda prompt_to_repeat: (f"{prompt_to_repeat}\nSo be it.", "So be it."),
    "combination:two_responses": lambda: ("One.\n******\nOther.", "One. Other."),
    "detectable_content:number_placeholders": lambda num_placeholders: often("[name]", num_placeholders, LEAST),
    "detectable_content:postscript": lambda postscript_marker: (f"So.\n{postscript_marker} More.", "So. More."),
    "detectable_format:constrained_response": lambda: ("My answer is maybe.", "Maybe."),
    "detectable_format:json_format": lambda: ('```json\n{"answer": 3}\n```', "answer: 3"),
    "detectable_format:multiple_sections": lambda num_sections, section_spliter: (
        "\n".join(f"{section_spliter} {place + 1}\nText." for place in range(num_sections)),
        f"{section_spliter} 1\nText.",
    ),
    "detectable_format:number_bullet_lists": lambda num_bullets: (
        "\n".join(["* a point"] * num_bullets),
        "\n".join(["* a point"] * (num_bullets + 1)),
    ),
    "detectable_format:number_highlighted_sections": lambda num_highlights: often("*passage*", num_highlights, LEAST),
    "detectable_format:title": lambda: ("<<a title>>\nText.", "# a title\nText."),
    "keywords:existence": lambda keywords: (" ".join(keywords), " ".join(keywords[1:]) or "none of it"),
    "keywords:forbidden_words": lambda forbidden_words: ("None of it.", f"But {forbidden_words[0]}."),
    "keywords:frequency": lambda keyword, frequency, relation: often(keyword, frequency, relation),
    "keywords:letter_frequency": lambda letter, let_frequency, let_relation: often(
        letter, let_frequency, let_relation, between=" 1 "
    ),
    "language:response_language": lambda language: (FOREIGN[language], ENGLISH),
    "length_constraints:nth_paragraph_first_word": lambda num_paragraphs, nth_paragraph, first_word: (
        "\n\n".join([f"{first_word}, so."] * num_paragraphs),
        "\n\n".join(["So."] * num_paragraphs),
    ),
    "length_constraints:number_paragraphs": lambda num_paragraphs: (
        "\n***\n".join(["So."] * num_paragraphs),
        "\n\n".join(["So."] * num_paragraphs),
    ),
    "length_constraints:number_sentences": lambda num_sentences, relation: often(
        "This is a sentence.", num_sentences, relation
    ),
    "length_constraints:number_words": lambda num_words, relation: often("word", num_words, relation),
    "punctuation:no_comma": lambda: ("One and two.", "One, two."),
    "startend:end_checker": lambda end_phrase: (f"So. {end_phrase}", f"{end_phrase} So."),
    "startend:quotation": lambda: ('"All of it."', '"All" of it.'),
}


def asked(text, **metadata):
    return Prompt((Message("user", text),), metadata)


PROMPTS = [asked(f"Describe the number {number} as {role} would.") for number in range(30) for role in ("kings", "X")]
EVERYTHING = ConstraintSettings(max_constraints=4)


def instructions(prompt):
    return list(zip(prompt.metadata["instruction_id_list"], prompt.metadata["kwargs"], strict=True))


def test_every_verifier_has_a_template():
    assert TEMPLATES.keys() == VERIFIERS.keys() == ANSWERS.keys()
    assert COMPATIBLE.keys() <= VERIFIERS.keys()
    assert {kind for kinds in (*EXCLUSIVE, *COMPATIBLE.values()) for kind in kinds} <= VERIFIERS.keys()


@pytest.mark.parametrize("kind", TEMPLATES)
def test_each_instruction_can_be_followed_and_violated_and_the_judge_agrees(kind):
    if kind in BY_PUNKT and NO_PUNKT:
        pytest.skip(NO_PUNKT)
    wordings, judge = set(), load_judge("verifier")
    for seed in range(3):
        for prompt in constrain(PROMPTS, ConstraintSettings(kinds=[kind]), seed=seed):
            ((name, settings),) = instructions(prompt)
            assert name == kind
            good, bad = ANSWERS[kind](**settings)
            assert follows(prompt.metadata, good) == [True], (settings, good)
            assert follows(prompt.metadata, bad) == [False], (settings, bad)
            (verdicts,) = judge([(prompt, [good, bad])])
            assert [verdict.reward for verdict in verdicts] == [1, 0]
            wordings.add(prompt.messages[-1].content.split("\n\n", 1)[1])
    assert len(wordings) >= sum(len(template.wordings) for template in TEMPLATES[kind])
    print(f"covered {len(wordings)} different instructions")


def test_wordings_contain_every_varying_setting():
    for kind, templates in TEMPLATES.items():
        for template in templates:
            several = {name for name, options in template.options.items() if callable(options) or len(options) > 1} - {
                "prompt_to_repeat"
            }  # which the request itself says
            for wording in template.wordings:
                assert all(f"{{{name}}}" in wording for name in several), (kind, wording)


def test_a_constrained_prompt_is_a_valid_ifeval_row():
    prompt = asked("Name a colour, please.", source="somewhere")
    (made,) = constrain([prompt], ConstraintSettings(kinds=["punctuation:no_comma"]), seed=0)
    row = json.loads(json.dumps(made.metadata))
    assert made.messages[-1].content == row["prompt"] == TASKS["ifeval"].question(row)
    assert row["prompt"].startswith("Name a colour, please.\n\n")
    assert row["source"] == "somewhere"
    good, bad = TASKS["ifeval"].grade([Graded(row, "Red."), Graded(row, "Red, blue.")])
    assert (good.parts["prompt_strict"], bad.parts["prompt_strict"]) == ((1, 1), (0, 1))


def test_instructions_are_appended_to_the_last_user_message():
    said = (
        Message("system", "Be brief."),
        Message("user", "Hi."),
        Message("assistant", "Hi!"),
        Message("user", "Who?"),
    )
    (made,) = constrain([Prompt(said)], ConstraintSettings(kinds=["startend:quotation"]), seed=0)
    assert made.messages[:3] == said[:3]
    assert made.messages[3].content.startswith("Who?\n\n")
    with pytest.raises(InputError, match="needs a user message"):
        constrain([Prompt((Message("system", "Be brief."),))], ConstraintSettings(), seed=0)


def test_instructions_depend_on_seed_and_prompt_only():
    whole = constrain(PROMPTS, EVERYTHING, seed=0)
    assert constrain(PROMPTS[::-1], EVERYTHING, seed=0)[::-1] == whole
    assert constrain(PROMPTS[7:9], EVERYTHING, seed=0) == whole[7:9]
    other = constrain(PROMPTS, EVERYTHING, seed=1)
    assert sum(one != two for one, two in zip(whole, other, strict=True)) > len(PROMPTS) / 2


def test_instructions_of_a_prompt_are_compatible():
    sizes, kinds = Counter(), Counter()
    for seed in range(20):
        for prompt in constrain(PROMPTS, EVERYTHING, seed=seed):
            names = [name for name, _ in instructions(prompt)]
            sizes[len(names)] += 1
            kinds.update(names)
            assert len(set(names)) == len(names)
            assert all(
                are_compatible(one, other) and are_compatible(other, one) for one, other in combinations(names, 2)
            )
            settings = dict(instructions(prompt))
            wanted = settings.get("keywords:existence", {"keywords": []})["keywords"]
            ruled_out = settings.get("keywords:forbidden_words", {"forbidden_words": []})["forbidden_words"]
            assert not set(wanted) & set(ruled_out)
    assert sizes.keys() == {1, 2, 3, 4}
    assert kinds.keys() == TEMPLATES.keys()
    print(f"covered {sizes.total()} prompts, by number of instructions {dict(sizes)}")


CONTRADICTORY = [
    ("change_case:english_capital", "change_case:english_lowercase"),
    ("detectable_format:json_format", "punctuation:no_comma"),
    ("detectable_format:constrained_response", "length_constraints:number_words"),
    ("keywords:forbidden_words", "keywords:frequency"),
    ("language:response_language", "change_case:english_capital"),
    ("length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word"),
    ("startend:end_checker", "detectable_content:postscript"),
    ("startend:quotation", "detectable_format:title"),  # as published
]


@pytest.mark.parametrize("pair", CONTRADICTORY, ids=" ".join)
def test_contradictory_kinds_are_never_combined(pair):
    for made in constrain(PROMPTS, ConstraintSettings(kinds=list(pair), max_constraints=2), seed=3):
        assert len(instructions(made)) == 1


def test_restricted_kinds_are_combined_with_compatible_kinds_only():
    assert are_compatible("combination:repeat_prompt", "keywords:existence")
    for kind, companions in COMPATIBLE.items():
        others = {other for other in TEMPLATES if are_compatible(kind, other)}
        assert others <= companions
        assert all(kind in COMPATIBLE.get(other, {kind}) for other in others)


def test_the_split_of_a_prompt_does_not_depend_on_instructions_or_spelling():
    parts = {split: constrain(PROMPTS, ConstraintSettings(split=split, max_constraints=2), seed=0) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(PROMPTS)
    told = {split: {made.messages[-1].content.split("\n\n")[0] for made in part} for split, part in parts.items()}
    for split, texts in told.items():
        assert texts, f"{split} is empty"
        assert {split_of(asked(text)) for text in texts} == {split}
        for seed in (1, 2):
            again = constrain(PROMPTS, ConstraintSettings(split=split), seed=seed)
            assert {made.messages[-1].content.split("\n\n")[0] for made in again} == texts
    assert split_of(asked("What is THIS?")) == split_of(asked("this is what")) == split_of(asked(" What is this... "))


def test_splits_have_their_sizes():
    found = Counter(split_of(asked(f"What is {number}?")) for number in range(5000))
    for split, tenths in SPLITS.items():
        assert found[split] / found.total() == pytest.approx(len(tenths) / 10, abs=0.03)


REFUSED = [
    ({"kinds": ["punctuation:no_comas"]}, "constraints.kinds: no instruction is called 'punctuation:no_comas'"),
    ({"kinds": ["punctuation:no_comas"]}, "did you mean 'punctuation:no_comma'"),
    ({"kinds": []}, "constraints.kinds: List should have at least 1 item"),
    ({"max_constraints": 0}, "constraints.max_constraints: Input should be greater than or equal to 1"),
    ({"split": "dev"}, "constraints.split: Input should be 'train', 'validation' or 'test'"),
    ({"kind": None}, "did you mean 'kinds'"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=str)
def test_invalid_constraint_settings_are_rejected_in_one_line(given, said):
    with pytest.raises(InputError) as refused:
        build(ConstraintSettings, given, ("constraints",))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_prompt_with_instructions_is_rejected():
    prompt = asked("Hi.", instructions=[{"id": "punctuation:no_comma"}])
    with pytest.raises(InputError, match="prompt 'Hi.' already has instructions"):
        constrain([prompt], ConstraintSettings(), seed=0)
