"""Instructions that a program can check: the 25 kinds of IFEval and a user's own; followed strictly or loosely."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, get_type_hints

from pydantic import create_model

from align.config import Settings, build
from align.errors import InputError, within
from align.registry import import_dotted, pick
from align.rewards.verifiers import layout, wording

Verifier = Callable[..., bool]  # (response, *, the instruction's settings by name) -> is it followed?


class Instruction(NamedTuple):
    """One instruction of a prompt, ready to be checked."""

    name: str
    check: Callable[[str], bool]

    def followed(self, response: str, *, loose: bool = False) -> bool:
        """Whether the response, or loosely any version of it, follows it; nothing that is empty follows anything."""
        versions = loose_versions(response) if loose else [response]
        return any(version.strip() and self.check(version) for version in versions)


def loose_versions(response: str) -> list[str]:
    """The response with and without its first line, its last line and its asterisks: eight versions or fewer."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cuts, *(cut.replace("*", "") for cut in cuts)]))


def follows(metadata: Mapping[str, Any], response: str, *, loose: bool = False) -> list[bool]:
    """One verdict an instruction of the prompt with this metadata, in order."""
    return [instruction.followed(response, loose=loose) for instruction in instructions(metadata)]


def instructions(metadata: Mapping[str, Any], table: Mapping[str, Verifier] | None = None) -> list[Instruction]:
    """The instructions of a prompt: its `instructions`, or IFEval's `instruction_id_list` and `kwargs`."""
    return [_instruction(VERIFIERS if table is None else table, name, kwargs) for name, kwargs in _asked(metadata)]


def with_custom(paths: Mapping[str, str]) -> dict[str, Verifier]:
    """Return `VERIFIERS` and a user's own verifiers, given as a name in the rows' instructions -> module:function.

    Rows refer to names and never to paths: data must not choose which code runs.
    """
    own: dict[str, Verifier] = {}
    for name, path in paths.items():
        with within(name):
            if name in VERIFIERS:
                raise InputError("this is the name of a built-in verifier; choose another one")
            own[name] = import_dotted(path, "verifier")
    return VERIFIERS | own


def _asked(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(id, kwargs) of each instruction; no entry where the prompt has none."""
    if "instruction_id_list" in metadata:
        names, settings = metadata["instruction_id_list"], metadata.get("kwargs")
        if not isinstance(names, Sequence) or not isinstance(settings, Sequence) or len(names) != len(settings):
            raise InputError("instruction_id_list and kwargs are two lists of equal length")
        entries = [{"id": name, "kwargs": each} for name, each in zip(names, settings, strict=True)]
    else:
        entries = metadata.get("instructions") or []
    return [_entry(entry) for entry in entries]


def _entry(entry: Any) -> tuple[str, Mapping[str, Any]]:  # noqa: ANN401 - a row's own value, before it is checked
    match entry:
        case {"id": str(name), "kwargs": Mapping() as kwargs} if len(entry) == 2:
            return name, kwargs
        case {"id": str(name), **rest} if not rest or rest == {"kwargs": None}:
            return name, {}
        case _:
            raise InputError(f'an instruction is {{"id": "kind:name", "kwargs": {{...}}}}, not {str(entry)[:80]}')


def _instruction(table: Mapping[str, Verifier], name: str, kwargs: Mapping[str, Any]) -> Instruction:
    verifier = pick(table, name, "verifier")
    values = {key: _whole(value) for key, value in kwargs.items() if value is not None}
    settings = build(_settings(verifier), values, (name,))
    return Instruction(name, partial(verifier, **dict(settings)))


def _whole(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """3 for 3.0: a table in which other rows lack the value, as on the hub, holds whole numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def _settings(verifier: Verifier) -> type[Settings]:
    """The keyword parameters of a verifier as settings, so that they are checked as a recipe's are."""
    hints = get_type_hints(verifier, include_extras=True)
    fields: dict[str, Any] = {
        parameter.name: (
            hints.get(parameter.name, Any),
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in list(inspect.signature(verifier).parameters.values())[1:]
    }
    return create_model(f"{verifier.__name__} settings", __base__=Settings, **fields)


VERIFIERS: dict[str, Verifier] = {
    "change_case:capital_word_frequency": wording.capital_word_frequency,
    "change_case:english_capital": wording.english_capital,
    "change_case:english_lowercase": wording.english_lowercase,
    "combination:repeat_prompt": layout.repeat_prompt,
    "combination:two_responses": layout.two_responses,
    "detectable_content:number_placeholders": layout.number_placeholders,
    "detectable_content:postscript": layout.postscript,
    "detectable_format:constrained_response": layout.constrained_response,
    "detectable_format:json_format": layout.json_format,
    "detectable_format:multiple_sections": layout.multiple_sections,
    "detectable_format:number_bullet_lists": layout.number_bullet_lists,
    "detectable_format:number_highlighted_sections": layout.number_highlighted_sections,
    "detectable_format:title": layout.title,
    "keywords:existence": wording.keywords_there,
    "keywords:forbidden_words": wording.forbidden_words,
    "keywords:frequency": wording.keyword_frequency,
    "keywords:letter_frequency": wording.letter_frequency,
    "language:response_language": wording.response_language,
    "length_constraints:nth_paragraph_first_word": layout.nth_paragraph_first_word,
    "length_constraints:number_paragraphs": layout.number_paragraphs,
    "length_constraints:number_sentences": wording.number_sentences,
    "length_constraints:number_words": wording.number_words,
    "punctuation:no_comma": wording.no_comma,
    "startend:end_checker": layout.end_checker,
    "startend:quotation": layout.quotation,
}
