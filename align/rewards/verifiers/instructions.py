"""Verifiable instructions (IFEval, Zhou et al. 2023): `VERIFIERS`, the 25 published kinds, and a user's own.

A row's metadata has `instructions`, a list of `{"id": "kind:name", "kwargs": {...}}`, or IFEval's two columns
`instruction_id_list` and `kwargs`. A verifier is a function of a response and of keyword parameters, whose annotations
validate the kwargs; it returns whether the response follows the instruction. A user's own verifiers are given by dotted
path in the settings of the judge `verifier`:

    judges: [{name: verifier, settings: {verifiers: {"my:short": "my_package.checks:is_short"}}}]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, get_type_hints

from pydantic import create_model

from align.config import Settings, build
from align.errors import InputError, InputErrors, within
from align.registry import UserCode, import_dotted, pick
from align.rewards.thoughts import visible_text
from align.rewards.verifiers import layout, wording

Verifier = Callable[..., bool]  # (response, **kwargs of the instruction) -> whether it is followed


class Instruction(NamedTuple):
    """One instruction of a prompt, with its kwargs."""

    name: str
    check: Callable[[str], bool]

    def followed(self, response: str, *, loose: bool = False) -> bool:
        """Return whether the response follows the instruction; loosely, whether any of `loose_versions` does.

        An empty response follows none. Thoughts are not checked.
        """
        response = visible_text(response)
        versions = loose_versions(response) if loose else [response]
        return any(version.strip() and self.check(version) for version in versions)


def loose_versions(response: str) -> list[str]:
    r"""Return the response with and without its first line, last line and asterisks: up to eight versions.

    >>> loose_versions("Sure:\n*yes*")
    ['Sure:\n*yes*', '*yes*', 'Sure:', '', 'Sure:\nyes', 'yes']
    """
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cuts, *(cut.replace("*", "") for cut in cuts)]))


def follows(metadata: Mapping[str, Any], response: str, *, loose: bool = False) -> list[bool]:
    """Return for each instruction of a prompt, in order, whether the response follows it.

    >>> follows({"instructions": [{"id": "punctuation:no_comma"}, {"id": "detectable_format:title"}]}, "<<A, b>>")
    [False, True]
    """
    return [instruction.followed(response, loose=loose) for instruction in instructions(metadata)]


def instructions(metadata: Mapping[str, Any], table: Mapping[str, Verifier] | None = None) -> list[Instruction]:
    """Return the instructions in a prompt's metadata; none where it has neither form of them."""
    return [_instruction(VERIFIERS if table is None else table, name, kwargs) for name, kwargs in _entries(metadata)]


def with_custom(paths: Mapping[str, str]) -> dict[str, Verifier]:
    """Return `VERIFIERS` and a user's own verifiers, given as a name in the rows' instructions -> module:function.

    Rows refer to names and never to paths: data must not choose which code runs.
    """
    own: dict[str, Verifier] = {}
    for name, path in paths.items():
        with within(name):
            if name in VERIFIERS:
                raise InputError("this is the name of a built-in verifier; choose another one")
            verifier: Verifier = import_dotted(path, "verifier")
            if not callable(verifier):
                raise InputError(f"{path!r} is not callable")
            own[name] = UserCode("verifier", path).wrap(verifier)
    return VERIFIERS | own


def _entries(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (id, kwargs) of each instruction."""
    if "instruction_id_list" in metadata:
        names = metadata["instruction_id_list"]
        kwargs = metadata.get("kwargs")
        if not isinstance(names, Sequence) or not isinstance(kwargs, Sequence) or len(names) != len(kwargs):
            raise InputError("instruction_id_list and kwargs must be two lists of equal length")
        entries = [{"id": name, "kwargs": each} for name, each in zip(names, kwargs, strict=True)]
    else:
        entries = metadata.get("instructions") or []
    return [_entry(entry) for entry in entries]


def _entry(entry: Any) -> tuple[str, Mapping[str, Any]]:  # noqa: ANN401 - a value of a row that is not yet checked
    match entry:
        case {"id": str(name), "kwargs": Mapping() as kwargs} if len(entry) == 2:
            return name, kwargs
        case {"id": str(name), **rest} if not rest or rest == {"kwargs": None}:
            return name, {}
        case _:
            raise InputError(f'an instruction must be {{"id": "kind:name", "kwargs": {{...}}}}, not {str(entry)[:80]}')


def _instruction(table: Mapping[str, Verifier], name: str, kwargs: Mapping[str, Any]) -> Instruction:
    verifier = pick(table, name, "verifier")
    values = {key: _as_integer(value) for key, value in kwargs.items() if value is not None}
    try:
        settings = build(_settings(verifier), values, (name,))
    except InputErrors as error:  # a row's error is one line
        raise InputError("; ".join(map(str, error.parts))) from error
    return Instruction(name, partial(verifier, **dict(settings)))


def _as_integer(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return 3 for 3.0: a table on the Hub in which some rows lack a value holds integers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def _settings(verifier: Verifier) -> type[Settings]:
    """Return the keyword parameters of a verifier as a settings class, so that kwargs are validated like a recipe."""
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
    "keywords:existence": wording.keywords_exist,
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
