"""The validation errors of settings as input errors: every error, with its location and the nearest key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ErrorDetails

from align.errors import InputError, Location, MissingKey, UnknownKey, joined, one_line
from align.foreign_keys import FOREIGN_KEYS
from align.registry import nearest, suggest

# Keys of version 0.1 and their names since 0.2; removed at 1.0
RENAMED_KEYS = {
    "fresh": "from_config",
    "groups_per_step": "prompts_per_step",
    "final_share": "min_lr_ratio",
    "exhausted": "stopping_strategy",
    "invalid": "on_error",
    "rate": "lr_multiplier",
    "most": "max_constraints",
    "rates": "metrics",
}
MAX_SHOWN = 80  # characters of a wrong value in an error
MISSING, UNKNOWN, PATTERN = "missing", "extra_forbidden", "string_pattern_mismatch"  # pydantic's names of these errors


class _Found(NamedTuple):
    """A validation error, with its location in the given values and the settings classes around it."""

    error: ErrorDetails
    place: Location
    kinds: list[type[BaseModel]]


def input_error(
    error: ValidationError, settings: type[BaseModel], values: Mapping[str, Any], loc: Location
) -> InputError:
    """Return all errors of a validation, with their locations below `loc`."""
    found = [_located(each, settings, values) for each in error.errors()]
    shown: dict[Location, list[InputError]] = {}
    for each in found:
        if not _is_explained(each, found):
            shown.setdefault(each.place, []).append(_input_error(each, (*loc, *each.place)))
    return joined([_alternatives(errors) for errors in shown.values()])


def _located(error: ErrorDetails, settings: type[BaseModel], values: Any) -> _Found:  # noqa: ANN401 - plain values
    """Return the error with its location, in which the tags of union members are left out."""
    kinds = models_in(settings)
    place = list[str | int]()
    value = values
    *above, last = error["loc"] or ("",)
    for part in above:
        inside = _inner(value, part)
        members = [model for model in kinds if model.__name__ == part]
        is_key = any(part in model.model_fields for model in kinds)  # perhaps one that a validator has added
        if inside is None and not is_key:  # the tag of a union's member
            kinds = members or kinds
            continue
        place.append(part)
        value = inside[0] if inside else {}
        fields = [model.model_fields[str(part)].annotation for model in kinds if part in model.model_fields]
        kinds = [model for field in fields for model in models_in(field)] or kinds
    if error["loc"] and (error["type"] == MISSING or _inner(value, last) is not None):
        place.append(last)
    return _Found(error, tuple(place), kinds)


def _inner(value: Any, part: str | int) -> tuple[Any] | None:  # noqa: ANN401 - plain values
    """Return what a value holds under a key or index, in a tuple of its own; None if it has no such part."""
    if isinstance(value, Mapping):
        return (value[part],) if part in value else None
    if isinstance(value, Sequence) and not isinstance(value, str) and isinstance(part, int) and part < len(value):
        return (value[part],)
    return None


def _is_explained(found: _Found, others: Sequence[_Found]) -> bool:
    """Return whether another error says the same: a misspelled key, or an error deeper inside the value."""
    if found.error["type"] == MISSING:
        unknown = [each for each in others if each.error["type"] == UNKNOWN]
        beside = [each for each in unknown if each.place[:-1] == found.place[: len(each.place) - 1]]
        return any(_nearest(each) in found.error["loc"] for each in beside)
    depth = len(found.place)
    is_deeper = any(len(each.place) > depth and each.place[:depth] == found.place for each in others)
    return is_deeper and found.error["type"].endswith("_type")


def _known(found: _Found) -> set[str]:
    """Return the keys that the settings around an error have."""
    return {name for kind in found.kinds for name in kind.model_fields}


def _nearest(found: _Found) -> str | None:
    """Return the key that an unknown one may stand for."""
    key, known = str(found.place[-1]), _known(found)
    return RENAMED_KEYS.get(key) or _translated(key, known) or nearest(key, known)


def _translated(key: str, known: set[str]) -> str | None:
    """Return the known key that another project calls `key`; None where there is none."""
    target, _ = FOREIGN_KEYS.get(key, (None, ""))
    name = (target or "").rpartition(".")[2]
    return name if name in known else None


def _input_error(found: _Found, place: Location) -> InputError:
    error = found.error
    if error["type"] == UNKNOWN:
        key = str(place[-1])
        known = _known(found)
        if RENAMED_KEYS.get(key) in known:
            return InputError(f"this key is called {RENAMED_KEYS[key]!r} since version 0.2", place)
        if (meant := _translated(key, known)) is None:
            return UnknownKey(f"unknown key; {suggest(key, known)}", place)
        note = FOREIGN_KEYS[key][1]
        return UnknownKey(f"unknown key; did you mean {meant!r}?{f' ({note})' if note else ''}", place)
    if error["type"] == MISSING:
        return MissingKey("this key is required", place)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # raised by a validator, perhaps about a key below its field
        for part in cause.parts:
            part.loc = (*place, *part.loc)
        return cause
    message = one_line(error["msg"].removeprefix("Value error, "))
    if error["type"] == PATTERN and (examples := _examples(found)):
        message = f"must look like {' or '.join(map(repr, examples))} (pattern {error.get('ctx', {}).get('pattern')})"
    form = _short_form(found) if error["type"].startswith("model") else None
    return InputError(f"{message}{form or ''} (got {repr(error['input'])[:MAX_SHOWN]})", place)


def _examples(found: _Found) -> list[Any]:
    """Return examples of a value that the settings give."""
    fields = [model.model_fields.get(str(found.place[-1])) for model in found.kinds]
    return [example for field in fields if field is not None for example in field.examples or ()]


def _short_form(found: _Found) -> str | None:
    """Return how to write a text as settings whose first key takes a text, as `policy: NAME` is meant."""
    fields = [model.model_fields.get(str(found.place[-1])) for model in found.kinds if found.place]
    models = [model for field in fields if field is not None for model in models_in(field.annotation)]
    models = models or found.kinds
    if len(models) != 1 or not isinstance(found.error["input"], str):
        return None
    name, field = next(iter(models[0].model_fields.items()))
    takes_text = str in (field.annotation, *get_args(field.annotation))
    return f", as in {{{name}: {found.error['input']}}}" if takes_text else None


def _alternatives(errors: Sequence[InputError]) -> InputError:
    """Return the errors of one place as one: each member of a union has its own."""
    first = errors[0]
    got = first.message[first.message.rfind(" (got ") :]
    messages = dict.fromkeys(error.message for error in errors if error.message.endswith(got))
    if len(messages) < 2 or not got.startswith(" (got "):
        return first
    return InputError(" or ".join(message.removesuffix(got) for message in messages) + got, first.loc)


def models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the settings classes in a field's type, directly or inside a list, mapping or union."""
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return models_in(annotation.model_fields["root"].annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in models_in(inner)]
