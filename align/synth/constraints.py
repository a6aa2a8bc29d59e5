"""Prompts combined with verifiable instructions, as in IFEval.

Adler et al. 2024 (Nemotron-4 340B, sec. 3.2.1) synthesize instruction-following prompts this way, from the verifiable
instructions of IFEval (Zhou et al. 2023). A prompt's instructions depend on (seed, messages) only, and its split on its
own text only, so a prompt is never in two splits with different instructions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

from align.errors import InputError
from align.inference.samples import prompt_key
from align.records import Message, Prompt
from align.synth.constraint_templates import TEMPLATES, Template
from align.synth.settings import ConstraintSettings, Split

SPLITS: dict[Split, range] = {"train": range(4, 10), "validation": range(3, 4), "test": range(3)}  # tenths of the hash
MAX_SHOWN = 40  # characters of a prompt in an error

# Kinds that leave no room for others, except the kinds listed
COMPATIBLE: dict[str, frozenset[str]] = {
    "combination:repeat_prompt": frozenset({"keywords:existence", "startend:end_checker"}),
    "combination:two_responses": frozenset({"keywords:existence", "keywords:forbidden_words", "punctuation:no_comma"}),
    "detectable_format:constrained_response": frozenset(),
    "detectable_format:json_format": frozenset({"keywords:existence", "keywords:forbidden_words"}),
    "language:response_language": frozenset(
        {"detectable_format:title", "length_constraints:number_words", "punctuation:no_comma", "startend:quotation"}
    ),
}

# At most one kind of each set is used in a prompt: two may contradict each other
EXCLUSIVE: tuple[frozenset[str], ...] = (
    frozenset(
        {  # letter case
            "change_case:capital_word_frequency",
            "change_case:english_capital",
            "change_case:english_lowercase",
            "detectable_format:multiple_sections",  # its headings are matched with their case
        }
    ),
    frozenset(
        {  # layout, or a length that leaves no room for a layout
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
        {  # a required and a forbidden word or letter
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
    frozenset({"detectable_content:postscript", "keywords:letter_frequency"}),  # the "p" of "P.S."
    frozenset({"detectable_content:postscript", "startend:end_checker"}),  # the end of the response
    frozenset({"startend:quotation", "length_constraints:number_paragraphs"}),
    # the beginning of the response
    frozenset({"startend:quotation", "detectable_format:title", "length_constraints:nth_paragraph_first_word"}),
)


class Constraint(NamedTuple):
    """A verifiable instruction, in words and as a verifier takes it."""

    kind: str
    wording: str
    settings: dict[str, Any]


def constrain(prompts: Sequence[Prompt], settings: ConstraintSettings, *, seed: int) -> list[Prompt]:
    """Return the prompts of the split with instructions appended to the last user message.

    The instructions are also added to the metadata, in IFEval's form (`instruction_id_list`, `kwargs`). A prompt gets
    fewer instructions than were drawn if no further kind is compatible. Raises `InputError` for a prompt that has
    instructions already.
    """
    chosen = [prompt for prompt in prompts if settings.split in (None, split_of(prompt))]
    return [_append(prompt, draw_constraints(prompt, settings, seed=seed)) for prompt in chosen]


def draw_constraints(
    prompt: Prompt, settings: ConstraintSettings, *, seed: int, without: Collection[str] = ()
) -> list[Constraint]:
    """Return the instructions of a prompt, drawn from the kinds of the settings except those in `without`."""
    kinds = sorted(set(settings.kinds or TEMPLATES) - set(without))
    return list(_draw(prompt, kinds, settings.max_constraints, seed=seed))


def instruction_columns(prompt: Prompt, text: str, constraints: Sequence[Constraint]) -> dict[str, Any]:
    """Return the columns of IFEval for a prompt whose last message has become `text`, with these instructions."""
    return {
        "key": prompt_key(prompt),
        "prompt": text,
        "instruction_id_list": [each.kind for each in constraints],
        "kwargs": [each.settings for each in constraints],
    }


def split_of(prompt: Prompt) -> Split:
    """Return the split of a prompt: a hash of the user's words, ignoring case, punctuation and order.

    >>> split_of(Prompt((Message("user", "What is this?"),))) == split_of(Prompt((Message("user", "This is WHAT"),)))
    True
    """
    words = sorted(re.findall(r"\w+", _user_text(prompt)[1].lower()))
    tenth = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()) % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def are_compatible(one: str, other: str) -> bool:
    """Return whether a prompt may ask for two kinds of instructions.

    >>> are_compatible("change_case:english_capital", "change_case:english_lowercase")
    False
    """
    pairs = ((one, other), (other, one))
    restricted = any(first in COMPATIBLE and second not in COMPATIBLE[first] for first, second in pairs)
    return one != other and not restricted and not any({one, other} <= kinds for kinds in EXCLUSIVE)


def _draw(prompt: Prompt, kinds: Sequence[str], max_constraints: int, *, seed: int) -> Iterator[Constraint]:
    address = repr((seed, "constraints", prompt_key(prompt)))
    rng = Random(hashlib.sha256(address.encode()).digest())
    number = rng.randint(1, max_constraints)
    chosen = list[str]()
    for kind in rng.sample(kinds, len(kinds)):
        if len(chosen) < number and all(are_compatible(kind, other) for other in chosen):
            chosen.append(kind)
            yield _instantiate(kind, rng.choice(TEMPLATES[kind]), _user_text(prompt)[1], rng)


def _instantiate(kind: str, template: Template, text: str, rng: Random) -> Constraint:
    """Draw the settings of a template for a prompt's text, and a wording."""
    options = {name: values(text) if callable(values) else values for name, values in template.options.items()}
    settings = {name: rng.choice(values) for name, values in options.items()}
    shown = {name: _in_words(value) for name, value in settings.items()}
    return Constraint(kind, rng.choice(template.wordings).format(**shown), settings)


def _in_words(value: Any) -> str:  # noqa: ANN401 - any setting of a verifier
    return " and ".join(f"'{each}'" for each in value) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownVariableType] - of any type


def _user_text(prompt: Prompt) -> tuple[int, str]:
    """Return the index and content of the last user message."""
    for index in range(len(prompt.messages) - 1, -1, -1):
        if prompt.messages[index].role == "user":
            return index, prompt.messages[index].content
    raise InputError("a prompt with constraints needs a user message")


def _append(prompt: Prompt, constraints: Sequence[Constraint]) -> Prompt:
    index, text = _user_text(prompt)
    if taken := {"instruction_id_list", "instructions"} & prompt.metadata.keys():
        raise InputError(f"prompt {text[:MAX_SHOWN]!r} already has {taken.pop()}; remove `constraints`")
    text = "\n\n".join([text.rstrip(), " ".join(each.wording for each in constraints)])
    messages = (*prompt.messages[:index], Message("user", text), *prompt.messages[index + 1 :])
    metadata = {**prompt.metadata, **instruction_columns(prompt, text, constraints)}
    return replace(prompt, messages=messages, metadata=metadata)
