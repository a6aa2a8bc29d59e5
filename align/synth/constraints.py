"""Real prompts joined with instructions that a program can check: what IFEval asks, of whatever somebody asked.

The Nemotron-4 report (Adler et al. 2024, sec. 3.2.1) makes its instruction-following prompts so, from the verifiable
instructions of IFEval (Zhou et al. 2023). A prompt's instructions depend on (seed, its messages) alone, and its split
on its own text alone, so that no prompt is in two splits under different instructions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from align.config import Settings
from align.errors import InputError
from align.inference.samples import prompt_key
from align.records import Message, Prompt
from align.registry import pick
from align.synth.constraint_templates import TEMPLATES, Template

Split = Literal["train", "validation", "test"]

SPLITS: dict[Split, range] = {"train": range(4, 10), "validation": range(3, 4), "test": range(3)}  # tenths of all texts

# Kinds that are asked for alone or beside these only: they leave no room for anything else.
COMPANIONS: dict[str, frozenset[str]] = {
    "combination:repeat_prompt": frozenset({"keywords:existence", "startend:end_checker"}),
    "combination:two_responses": frozenset({"keywords:existence", "keywords:forbidden_words", "punctuation:no_comma"}),
    "detectable_format:constrained_response": frozenset(),
    "detectable_format:json_format": frozenset({"keywords:existence", "keywords:forbidden_words"}),
    "language:response_language": frozenset(
        {"detectable_format:title", "length_constraints:number_words", "punctuation:no_comma", "startend:quotation"}
    ),
}

# Of each of these sets a prompt gets one kind at most: two of them contradict each other, or can by what is drawn.
APART: tuple[frozenset[str], ...] = (
    frozenset(
        {  # of two cases
            "change_case:capital_word_frequency",
            "change_case:english_capital",
            "change_case:english_lowercase",
            "detectable_format:multiple_sections",  # its heading is looked for as it is written
        }
    ),
    frozenset(
        {  # of two layouts, or of a length that a layout has no room in
            "detectable_format:multiple_sections",
            "detectable_format:number_bullet_lists",
            "detectable_format:number_highlighted_sections",
            "length_constraints:nth_paragraph_first_word",
            "length_constraints:number_paragraphs",
            "length_constraints:number_sentences",
            "length_constraints:number_words",
        }
    ),
    frozenset(
        {  # of two words or letters, one asked for and one ruled out
            "detectable_format:multiple_sections",
            "keywords:forbidden_words",
            "keywords:frequency",
            "keywords:letter_frequency",
            "length_constraints:nth_paragraph_first_word",
            "startend:end_checker",
        }
    ),
    frozenset({"keywords:existence", "keywords:letter_frequency"}),
    frozenset({"detectable_format:number_bullet_lists", "keywords:letter_frequency"}),
    frozenset({"detectable_content:postscript", "keywords:letter_frequency"}),  # the `p` of P.S.
    frozenset({"detectable_content:postscript", "startend:end_checker"}),  # of two ends
    frozenset({"startend:quotation", "length_constraints:number_paragraphs"}),
    # of two beginnings
    frozenset({"startend:quotation", "detectable_format:title", "length_constraints:nth_paragraph_first_word"}),
)


def _known(kinds: list[str] | None) -> list[str] | None:
    for kind in kinds or ():
        pick(TEMPLATES, kind, "instruction")
    return kinds


class ConstraintSettings(Settings):
    """Which instructions prompts are joined with, how many, and which prompts."""

    kinds: Annotated[list[str], Field(min_length=1), AfterValidator(_known)] | None = None  # of TEMPLATES; else all
    max_constraints: int = Field(default=1, ge=1)  # instructions of a prompt; each number up to it is as likely
    split: Split | None = None  # the prompts of this split only; see `split_of`


class Asked(NamedTuple):
    """An instruction in words, and as a verifier takes it."""

    kind: str
    words: str
    settings: dict[str, Any]


def constrain(prompts: Sequence[Prompt], settings: ConstraintSettings, *, seed: int) -> list[Prompt]:
    """The prompts of the split with instructions after the last user message and, in IFEval's form, in the metadata.

    A prompt gets fewer than were drawn where no further kind agrees with those that it has.
    """
    kinds = sorted(set(settings.kinds or TEMPLATES))
    there = [prompt for prompt in prompts if settings.split in (None, split_of(prompt))]
    return [_joined(prompt, list(_drawn(prompt, kinds, settings.max_constraints, seed=seed))) for prompt in there]


def split_of(prompt: Prompt) -> Split:
    """The split of a prompt by what its user says, whatever the case, the marks and the order of the words."""
    words = sorted(re.findall(r"\w+", _user_text(prompt)[1].lower()))
    tenth = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()) % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def agree(one: str, other: str) -> bool:
    """Whether two kinds of instruction can be asked for together."""
    alone = any(kind in COMPANIONS and beside not in COMPANIONS[kind] for kind, beside in ((one, other), (other, one)))
    return one != other and not alone and not any({one, other} <= kinds for kinds in APART)


def _drawn(prompt: Prompt, kinds: Sequence[str], most: int, *, seed: int) -> Iterator[Asked]:
    place = repr((seed, "constraints", prompt_key(prompt)))
    rng = Random(hashlib.sha256(place.encode()).digest())
    number, chosen = rng.randint(1, most), list[str]()
    for kind in rng.sample(kinds, len(kinds)):
        if len(chosen) < number and all(agree(kind, other) for other in chosen):
            chosen.append(kind)
            yield _asked(kind, rng.choice(TEMPLATES[kind]), _user_text(prompt)[1], rng)


def _asked(kind: str, template: Template, text: str, rng: Random) -> Asked:
    made = {name: options(text) if callable(options) else options for name, options in template.options.items()}
    settings = {name: rng.choice(options) for name, options in made.items()}
    said = {name: _said(value) for name, value in settings.items()}
    return Asked(kind, rng.choice(template.wordings).format(**said), settings)


def _said(value: Any) -> str:  # noqa: ANN401 - any setting of a verifier
    return " and ".join(f"'{each}'" for each in value) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownVariableType] - of any type


def _user_text(prompt: Prompt) -> tuple[int, str]:
    """Place and content of the last user message."""
    for place in range(len(prompt.messages) - 1, -1, -1):
        if prompt.messages[place].role == "user":
            return place, prompt.messages[place].content
    raise InputError("a prompt to be constrained needs a user message")


def _joined(prompt: Prompt, asked: Sequence[Asked]) -> Prompt:
    if taken := {"instruction_id_list", "instructions"} & prompt.metadata.keys():
        raise InputError(f"prompt {_user_text(prompt)[1][:40]!r}: has {taken.pop()} of its own; leave out constraints")
    place, text = _user_text(prompt)
    text = "\n\n".join([text.rstrip(), " ".join(each.words for each in asked)])
    messages = (*prompt.messages[:place], Message("user", text), *prompt.messages[place + 1 :])
    columns = {
        "key": prompt_key(prompt),
        "prompt": text,
        "instruction_id_list": [each.kind for each in asked],
        "kwargs": [each.settings for each in asked],
    }
    return replace(prompt, messages=messages, metadata={**prompt.metadata, **columns})
