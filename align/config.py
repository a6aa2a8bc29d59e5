"""Settings and YAML: frozen pydantic models, overrides, error locations and stable hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from yaml import MappingNode, Node, SafeLoader, ScalarNode, SequenceNode, YAMLError, compose

from align.build_errors import MAX_SHOWN, input_error
from align.errors import InputError, Location, dotted_loc, joined, one_line
from align.redaction import add_interpolations

S = TypeVar("S", bound=BaseModel)

OVERRIDE = re.compile(r"[^.=]+(\.[^.=]+)*=")
ENTRY = re.compile(r"(data|steps|search|steps\.[^.]+\.(tasks|families))\.[^.]+")  # what an override with null removes
HOME = re.compile(r"^(gguf:)?~(?=/)")  # at the beginning of a path


class Settings(BaseModel):
    """Base class of all settings: frozen, strict about types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    refused: ClassVar[Mapping[str, str]] = {}  # optional keys, also nested, that would always be wrong here -> why

    if not TYPE_CHECKING:  # type checkers derive the parameters from the fields

        def __init__(self, /, **values: Any) -> None:  # noqa: ANN401 - settings of any type
            """Validate the values; raise `InputError`, one line for each error, where they are wrong."""
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise input_error(error, type(self), values, ()) from None

        __init__.__pydantic_base_init__ = True  # as in BaseModel: settings inside others are validated without it

    @model_validator(mode="after")
    def _check_refused(self) -> Self:
        for key, reason in self.refused.items():
            names = tuple(key.split("."))
            if reduce(lambda value, name: getattr(value, name, None), names, self) is not None:
                raise InputError(reason, names)
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of a YAML file with `key.sub=value` overrides applied and interpolations resolved.

    An override may set a key that is not in the file. Unknown keys are reported later, by `build`. `steps.NAME=null`
    removes a step; sources, tasks, families and searches are removed in the same way.
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
        lines = lines_of(path)
        parts = sorted(error.parts, key=lambda part: _line_of(part.loc, lines) or 0)
        placed = [InputError(f"{_source_of(part.loc, path, lines, overrides)}: {part}") for part in parts]
        raise joined(placed) from error


def _line_of(loc: Location, lines: Mapping[str, int]) -> int | None:
    """Return the line of a key, or of the nearest key above it; None if the file has neither."""
    return next((lines[prefix] for prefix in _prefixes(loc) if prefix in lines), None)


def _prefixes(loc: Location) -> list[str]:
    """Return the dotted location and those of all keys above it, the longest first."""
    return [dotted_loc(loc[:length]) for length in range(len(loc), 0, -1)]


def _source_of(loc: Location, path: Path, lines: Mapping[str, int], overrides: Sequence[str]) -> str:
    """Return the override or `file:line` that set the value at `loc`, or the nearest key above it."""
    prefixes = _prefixes(loc)
    keys = {override: override.partition("=")[0] for override in overrides}
    override = next((each for each in overrides if keys[each] in prefixes), None)
    if override is not None:
        return f"override {override!r}"
    line = _line_of(loc, lines)
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
            _apply(override, recipe)
        at = source
        resolved = OmegaConf.to_container(recipe, resolve=True, throw_on_missing=True)
        add_interpolations(OmegaConf.to_container(recipe), resolved, environment=os.environ)
        return resolved
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise InputError(f"{at}: {one_line(error)}") from error


def _apply(override: str, recipe: DictConfig) -> None:
    """Set the override's value in the recipe, or remove the named entry."""
    key, _, value = override.partition("=")
    if value != "null" or not ENTRY.fullmatch(key):
        recipe.merge_with_dotlist([override])
        return
    above, _, name = key.rpartition(".")
    entries = OmegaConf.select(recipe, above)
    if not isinstance(entries, DictConfig) or name not in entries:
        raise InputError(f"nothing to remove: there is no {key}")
    del entries[name]


def _as_json(values: object) -> dict[str, Any]:
    """Return the values as JSON has them: YAML's key 1 becomes "1". A path `~/…` becomes one in the user's home."""
    try:
        return _in_home(json.loads(json.dumps(values)))
    except TypeError as error:
        allowed = "values must be strings, numbers, booleans, or lists or mappings of these"
        for loc, value in _leaves(values):
            if isinstance(value, bytes):
                raise InputError(f"{allowed} (got {repr(value)[:MAX_SHOWN]})", loc) from error
        raise InputError(f"{one_line(error)}: {allowed}") from error


def _in_home(value: Any) -> Any:  # noqa: ANN401 - YAML holds any type
    if isinstance(value, dict):
        return {key: _in_home(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_in_home(each) for each in cast("list[Any]", value)]
    if isinstance(value, str):
        return HOME.sub(lambda match: (match[1] or "") + os.path.expanduser("~"), value)
    return value


def _leaves(value: Any, loc: Location = ()) -> Iterator[tuple[Location, Any]]:  # noqa: ANN401 - YAML holds any type
    """Yield the location and value of everything that is not a mapping or list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield loc, value
    for key, each in inner or ():
        yield from _leaves(each, (*loc, key))


def build(settings: type[S], values: Mapping[str, Any], loc: Location = ()) -> S:
    """Return `settings` made from plain values; each error carries its location below `loc`.

    Values are validated as JSON: a list may become a tuple and a string a path, but no string becomes a number.
    """
    try:
        return settings.model_validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        raise input_error(error, settings, values, loc) from error


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
