"""Settings and YAML: frozen pydantic models, overrides, error locations and stable hashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, RootModel, ValidationError
from yaml import MappingNode, Node, SafeLoader, ScalarNode, SequenceNode, YAMLError, compose

from align.errors import InputError, Location, dotted_loc, one_line
from align.registry import suggest

S = TypeVar("S", bound=BaseModel)

OVERRIDE = re.compile(r"[^.=]+(\.[^.=]+)*=")
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


class Settings(BaseModel):
    """Base class of all settings: frozen, strict about types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of a YAML file with `key.sub=value` overrides applied and interpolations resolved.

    An override may set a key that is not in the file. Unknown keys are reported later, by `build`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such recipe")
    values = _resolved(lambda: OmegaConf.load(path), overrides, str(path))
    with located(path, overrides):
        return _as_json(values)


@contextmanager
def located(path: Path, overrides: Sequence[str]) -> Generator[None]:
    """Prefix every `InputError` raised in this block with the line of the file, or the override, that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{_source_of(error.loc, path, overrides)}: {error}") from error


def _source_of(loc: Location, path: Path, overrides: Sequence[str]) -> str:
    """Return the override or `file:line` that set the value at `loc`, or the nearest key above it."""
    prefixes = [dotted_loc(loc[:length]) for length in range(len(loc), 0, -1)]
    keys = {override: override.partition("=")[0] for override in overrides}
    override = next((each for each in overrides if keys[each] in prefixes), None)
    if override is not None:
        return f"override {override!r}"
    lines = lines_of(path)
    line = next((lines[prefix] for prefix in prefixes if prefix in lines), None)
    at = f"{path}{f':{line}' if line else ''}"
    # The cause may also be an override of a key inside the value
    below = [f"override {each!r}" for each in overrides if loc and keys[each].startswith(f"{dotted_loc(loc)}.")]
    return " and ".join([*below[-1:], at])


def lines_of(path: Path) -> dict[str, int]:
    """Return the line number of each key of a YAML file, by its dotted location."""
    found: dict[str, int] = {}

    def walk(node: Node | None, loc: str) -> None:
        if isinstance(node, MappingNode):
            children = [(str(key.value), key, value) for key, value in node.value if isinstance(key, ScalarNode)]
        elif isinstance(node, SequenceNode):
            children = [(str(number), value, value) for number, value in enumerate(node.value)]
        else:
            return
        for name, at, value in children:
            inner = f"{loc}.{name}".lstrip(".")
            found[inner] = at.start_mark.line + 1
            walk(value, inner)

    walk(compose(path.read_text("utf-8"), Loader=SafeLoader), "")
    return found


def read_overrides(overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the defaults with `key.sub=value` settings applied."""
    return _as_json(_resolved(lambda: OmegaConf.create(dict(defaults or {})), overrides, "settings"))


def _resolved(load: Callable[[], Any], overrides: Sequence[str], source: str) -> object:
    """Return the loaded values with overrides and interpolations applied; errors name the source or the override."""
    wrong = [override for override in overrides if not OVERRIDE.match(override)]
    if wrong:
        raise InputError(f"override {wrong[0]!r} is not of the form key.sub=value")
    at = source
    try:
        recipe = load()
        if not isinstance(recipe, DictConfig):
            raise InputError("a recipe is a mapping of keys to values, not a list")
        for override in overrides:
            at = f"override {override!r}"
            recipe.merge_with_dotlist([override])
        at = source
        return OmegaConf.to_container(recipe, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise InputError(f"{at}: {one_line(error)}") from error


def _as_json(values: object) -> dict[str, Any]:
    """Return the values as JSON has them: YAML's key 1 becomes "1"."""
    try:
        return json.loads(json.dumps(values))
    except TypeError as error:
        allowed = "values must be strings, numbers, booleans, or lists or mappings of these"
        for loc, value in _leaves(values):
            if isinstance(value, bytes):
                raise InputError(f"{allowed} (got {repr(value)[:MAX_SHOWN]})", loc) from error
        raise InputError(f"{one_line(error)}: {allowed}") from error


def _leaves(value: Any, loc: Location = ()) -> Iterator[tuple[Location, Any]]:  # noqa: ANN401 - YAML holds any type
    """Yield the location and value of everything that is not a mapping or list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield loc, value
    for key, each in inner or ():
        yield from _leaves(each, (*loc, key))


def build(settings: type[S], values: Mapping[str, Any], loc: Location = ()) -> S:
    """Return `settings` made from plain values; the first error carries its location below `loc`.

    Values are validated as JSON: a list may become a tuple and a string a path, but no string becomes a number.
    """
    try:
        return settings.model_validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        raise _first_error(error, settings, loc) from error


def _first_error(error: ValidationError, settings: type[BaseModel], loc: Location) -> InputError:
    errors = error.errors()
    first = errors[0]
    if first["type"] == "missing":  # the key may be present under a misspelled name, itself or one above it
        unknown = [each for each in errors if each["type"] == "extra_forbidden"]
        first = next((each for each in unknown if each["loc"][:-1] == first["loc"][: len(each["loc"]) - 1]), first)
    kinds, keys = _follow(_models_in(settings), first["loc"][:-1])
    place = (*loc, *keys, *_follow(kinds, first["loc"][-1:]).keys)
    if first["type"] == "extra_forbidden":
        key, known = str(first["loc"][-1]), {name for kind in kinds for name in kind.model_fields}
        if RENAMED_KEYS.get(key) in known:
            return InputError(f"this key is called {RENAMED_KEYS[key]!r} since version 0.2", place)
        return InputError(f"unknown key; {suggest(key, known)}", place)
    if first["type"] == "missing":
        return InputError("this key is required", place)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # raised by a validator, perhaps about a key below its field
        return InputError(cause.message, (*place, *cause.loc))
    message = one_line(first["msg"].removeprefix("Value error, "))
    return InputError(f"{message} (got {repr(first['input'])[:MAX_SHOWN]})", place)


class _Followed(NamedTuple):
    models: list[type[BaseModel]]  # that the last key may hold
    keys: Location


def _follow(models: list[type[BaseModel]], path: Location) -> _Followed:
    """Follow the location of a validation error through the types; `keys` leaves out the names of union members."""
    keys: list[str | int] = []
    for part in path:
        members = [model for model in models if model.__name__ == part]
        if members:
            models = members
            continue
        keys.append(part)
        fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [found for field in fields for found in _models_in(field)] or models
    return _Followed(models, tuple(keys))


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the settings classes in a field's type, directly or inside a list, mapping or union."""
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return _models_in(annotation.model_fields["root"].annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models_in(inner)]


def stable_hash(value: object) -> str:
    """Return 16 hex digits that depend only on the content of settings or JSON-like values, not on key order."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    """Return settings or a path in a form that JSON can hold."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings consist of plain values and paths, not {type(value).__name__}")
