"""Recipes: YAML to frozen pydantic models, strictly, with overrides and a stable hash. No domain field lives here."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


class InputError(ValueError):
    """Something a person gave is wrong; one line says what, where, the value and what would be right. Exit status 2."""


class RunError(RuntimeError):
    """A run failed after its input was accepted; one line says where and why. Exit status 1."""


class Settings(BaseModel):
    """Base of every group of settings: frozen, complete, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=False)


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
    except (ImportError, AttributeError) as error:
        raise InputError(f"{kind} {path!r} cannot be imported as module:name: {error}") from error


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe at `path` with `key.sub=value` overrides applied and interpolations resolved.

    An override may set a key that the recipe leaves out; whether the key is known is the schema's to say.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such recipe")
    wrong = [override for override in overrides if "=" not in override or override.startswith("=")]
    if wrong:
        raise InputError(f"override {wrong[0]!r} is not of the form key.sub=value")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    if not isinstance(plain, dict):
        raise InputError(f"{path}: a recipe is a mapping, not a {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def build(settings: type[S], values: Mapping[str, Any], where: str) -> S:
    """`settings` made from plain values; the first thing wrong with them becomes one line that names its place."""
    try:
        return settings.model_validate(dict(values), strict=False)
    except ValidationError as error:
        raise InputError(_explain(error, settings, where)) from error


def _explain(error: ValidationError, settings: type[Settings], where: str) -> str:
    first = error.errors()[0]
    place = ".".join([where, *(str(part) for part in first["loc"])]).strip(".")
    if first["type"] == "extra_forbidden":
        names = _fields_at(settings, [str(part) for part in first["loc"][:-1]])
        return f"{place}: unknown key; {nearest(str(first['loc'][-1]), names)}"
    if first["type"] == "missing":
        return f"{place}: this key is required and not there"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (got {str(first['input'])[:80]!r})"


def _fields_at(settings: type[Settings], path: list[str]) -> list[str]:
    """Field names of the nested settings that `path` leads to."""
    for part in path:
        field = settings.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Settings)]
        if nested:
            settings = nested[0]
    return list(settings.model_fields)


def stable_hash(value: object) -> str:
    """Sixteen hex digits that depend on the content of a JSON-like value or settings, not on order or process."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def one_line(error: BaseException | str) -> str:
    """An error's text folded to one line."""
    return " ".join(str(error).split())
