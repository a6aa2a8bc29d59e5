"""Recipes: YAML to frozen pydantic models, strictly, with overrides and a stable hash. No domain field lives here."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import re
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import MappingNode, Node, SafeLoader, ScalarNode, SequenceNode, YAMLError, compose

T = TypeVar("T")
S = TypeVar("S", bound="Settings")

PLACE = re.compile(r"([A-Za-z_][\w-]*(?:\.[^.:'\"]+)*): ")  # how an error that knows its place in a recipe begins
# What importing a user's module may raise: it runs their program.
OF_A_PROGRAM = (
    ImportError,
    AttributeError,
    ValueError,
    TypeError,
    SyntaxError,
    NameError,
    LookupError,
    ArithmeticError,
    AssertionError,
    OSError,
    RuntimeError,
)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # module:name
OVERRIDE = re.compile(r"[^.=]+(\.[^.=]+)*=")


class InputError(ValueError):
    """Something a person gave is wrong; one line says what, where, the value and what would be right. Exit status 2."""


class RunError(RuntimeError):
    """A run failed after its input was accepted; one line says where and why. Exit status 1."""


class Settings(BaseModel):
    """Base of every group of settings: frozen, complete, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def nearest(name: str, names: Iterable[str]) -> str:
    """The hint that ends an error about a wrong name: the nearest right one, and all there are."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(known)}"


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry called `name`, or an error that offers the nearest right one."""
    if name not in table:
        raise InputError(f"no {kind} is called {name!r}; {nearest(name, table)}")
    return table[name]


def dotted(path: str, kind: str) -> Any:  # noqa: ANN401 - a user's own object has whatever type it has
    """The object that `package.module:name` names: how a user's own piece comes in."""
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except OF_A_PROGRAM as error:
        raise InputError(f"{kind} {path!r} cannot be imported as module:name: {_told(error)}") from error


def file_of(path: str) -> Path | None:
    """The file with the code that `package.module:name` names; None where the text names none that is found."""
    if not DOTTED.fullmatch(path):
        return None
    with suppress(*OF_A_PROGRAM):
        found = find_spec(path.partition(":")[0])
        return None if found is None or not found.has_location else Path(str(found.origin))
    return None


def _told(error: Exception) -> str:
    """What went wrong in a user's module, with the file and line unless it was not even found."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # behind our own
    there = [frame for frame in frames if not frame.filename.startswith(("<", os.path.dirname(os.__file__)))]
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {one_line(error.msg)}"
    where = f"{there[-1].filename}:{there[-1].lineno}: " if there else ""
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return f"{where}{kind}{one_line(error)}"


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe at `path` with `key.sub=value` overrides applied and interpolations resolved.

    An override may set a key that the recipe leaves out; whether the key is known is the schema's to say.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such recipe")
    return _plain_values(lambda: OmegaConf.load(path), overrides, str(path))


@contextmanager
def located(path: Path, overrides: Sequence[str]) -> Generator[None]:
    """A block whose errors begin with the line of the recipe that they are about, or with the override."""
    try:
        yield
    except InputError as error:
        place, found, _ = str(error).partition(": ")
        parts = place.split(".") if found else []
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        keys = {each: each.partition("=")[0] for each in overrides}
        said = next((each for each in overrides if keys[each] in prefixes), None)
        if said is not None:
            raise InputError(f"override {said!r}: {error}") from error
        lines = lines_of(path)
        line = next((lines[prefix] for prefix in prefixes if prefix in lines), None)
        below = [f"override {each!r}" for each in overrides if found and keys[each].startswith(f"{place}.")]
        at = f"{path}{f':{line}' if line else ''}"  # where it may be right, and the override below it wrong
        raise InputError(f"{' and '.join([*below[-1:], at])}: {error}") from error


def lines_of(path: Path) -> dict[str, int]:
    """The line on which each key of a YAML file stands, by its dotted place."""
    found: dict[str, int] = {}

    def walk(node: Node | None, place: str) -> None:
        if isinstance(node, MappingNode):
            children = [(str(key.value), key, value) for key, value in node.value if isinstance(key, ScalarNode)]
        elif isinstance(node, SequenceNode):
            children = [(str(number), value, value) for number, value in enumerate(node.value)]
        else:
            return
        for name, at, value in children:
            inner = f"{place}.{name}".lstrip(".")
            found[inner] = at.start_mark.line + 1
            walk(value, inner)

    walk(compose(path.read_text("utf-8"), Loader=SafeLoader), "")
    return found


def read_overrides(overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The defaults with `key.sub=value` settings applied."""
    return _plain_values(lambda: OmegaConf.create(dict(defaults or {})), overrides, "settings")


def _plain_values(load: Callable[[], Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    wrong = [override for override in overrides if not OVERRIDE.match(override)]
    if wrong:
        raise InputError(f"override {wrong[0]!r} is not of the form key.sub=value")
    source = where
    try:
        recipe = load()
        if not isinstance(recipe, DictConfig):
            raise InputError("a recipe is a mapping of names to values, not a list")
        for override in overrides:
            where = f"override {override!r}"
            recipe.merge_with_dotlist([override])
        where = source
        plain = OmegaConf.to_container(recipe, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise InputError(f"{where}: {one_line(error)}") from error
    try:
        return json.loads(json.dumps(plain))  # the key 1 of YAML is "1", as in the hash
    except TypeError as error:
        odd = next(
            (f"{place}: {value!r}" for place, value in _leaves(plain) if isinstance(value, bytes)), one_line(error)
        )
        raise InputError(f"{source}: {odd}: values are texts, numbers, switches, lists and mappings of them") from error


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - plain values of YAML
    """Every value that holds no others, with its dotted place."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield place, value
    for key, each in inner or ():
        yield from _leaves(each, f"{place}.{key}".lstrip("."))


def build(settings: type[S], values: Mapping[str, Any], where: str) -> S:
    """`settings` made from plain values; the first thing wrong with them becomes one line that names its place.

    Values are taken as JSON: a list may become a tuple and a text a path, but no text a number and no number a switch.
    """
    try:
        return settings.model_validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        raise InputError(_explain(error, settings, where)) from error


def _explain(error: ValidationError, settings: type[Settings], where: str) -> str:
    errors = error.errors()
    first = errors[0]
    if first["type"] == "missing":  # perhaps it is there under a misspelled name
        beside = [each for each in errors if each["loc"][:-1] == first["loc"][:-1]]
        first = next((each for each in beside if each["type"] == "extra_forbidden"), first)
    path = [str(part) for part in first["loc"]]
    place = ".".join([where, *path]).strip(".")
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key; {nearest(path[-1], _fields_at([settings], path[:-1]))}"
    if first["type"] == "missing":
        return f"{place}: this key is required and not there"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # which says the value, and perhaps which setting within it is
        return f"{place}{'.' if PLACE.match(str(cause)) else ': '}{cause}".removeprefix(": ")
    message = one_line(first["msg"].removeprefix("Value error, "))
    return f"{place}: {message} (got {repr(first['input'])[:80]})"


def _fields_at(kinds: list[type[Settings]], path: list[str]) -> set[str]:
    """Field names of the settings that `path` leads to; of all of them where a place may hold several."""
    for part in path:
        named = [kind for kind in kinds if kind.__name__ == part]  # pydantic's word for a member of a union
        fields = [kind.model_fields[part].annotation for kind in kinds if part in kind.model_fields]
        kinds = named or [found for field in fields for found in _settings_in(field)] or kinds
    return {name for kind in kinds for name in kind.model_fields}


def _settings_in(annotation: object) -> list[type[Settings]]:
    """The settings that a field may hold, itself or in a list, mapping or union."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _settings_in(inner)]


def stable_hash(value: object) -> str:
    """Sixteen hex digits that depend on the content of a JSON-like value or settings, not on order or process."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    """What JSON can hold in place of settings or a path."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings are made of plain values and paths, not of {type(value).__name__}")


def one_line(error: BaseException | str) -> str:
    """An error's text folded to one line."""
    return " ".join(str(error).split())
