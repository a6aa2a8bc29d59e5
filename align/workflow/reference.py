"""The key reference: every recipe key with its type, default and meaning, from the settings themselves."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from align.accounting.settings import AccountingSettings
from align.models.settings import PolicySettings
from align.registry import pick
from align.stages.inputs.sources import SourceSettings
from align.stages.table import STAGES
from align.workflow.schema import WrittenRecipe

REQUIRED = "required"
MAX_DEFAULT = 60  # characters of a default value in the table


class Key(NamedTuple):
    """One key of a recipe."""

    key: str
    type: str
    default: str
    meaning: str


# Sections of the reference: a part of the recipe, or a stage
SECTIONS: dict[str, tuple[str, type[BaseModel]]] = {
    "recipe": ("Top level", WrittenRecipe),
    "policy": ("`policy`: the model that the recipe starts from", PolicySettings),
    "data": ("`data.NAME`: a source of rows", SourceSettings),
    "accounting": ("`accounting`: cost and energy", AccountingSettings),
    **{name: (f"`steps.NAME` with `stage: {name}`", stage) for name, stage in STAGES.items()},
}


def keys(section: str) -> list[Key]:
    """Return every key of a section, nested ones as `key.sub`."""
    _, settings = pick(SECTIONS, section, "section")
    nested = section != "recipe"  # the top level's parts have sections of their own
    return list(_keys(settings, "", nested=nested))


def markdown() -> str:
    """Return the whole reference as Markdown tables."""
    parts: list[str] = []
    for name, (title, settings) in SECTIONS.items():
        rows = [
            f"| `{key.key}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.meaning)} |" for key in keys(name)
        ]
        intro = (settings.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"### {title}", "", intro, "", *table]))
    return "\n\n".join(parts) + "\n"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for completion in an editor."""
    schema = WrittenRecipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "align recipe", **schema}


def _keys(settings: type[BaseModel], prefix: str, *, nested: bool) -> Iterator[Key]:
    for name, field in settings.model_fields.items():
        if name == "stage":
            continue
        key = f"{prefix}{name}"
        yield Key(key, _type_name(field.annotation), _default(field), " ".join((field.description or "").split()))
        if nested:
            for inner, suffix in _inner(field.annotation):
                yield from _keys(inner, f"{key}{suffix}.", nested=True)


def _inner(annotation: Any) -> list[tuple[type[BaseModel], str]]:  # noqa: ANN401 - any annotation
    """Return the settings in an annotation, with what stands between their keys and the field's."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return _inner(annotation.model_fields["root"].annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    if origin in (Union, types.UnionType, Annotated):
        return [found for part in get_args(annotation) for found in _inner(part)]
    if origin is list:
        return [(found, f"[]{suffix}") for part in get_args(annotation) for found, suffix in _inner(part)]
    if origin in (dict, Mapping):
        return [(found, f".NAME{suffix}") for found, suffix in _inner(get_args(annotation)[1])]
    return []


def _type_name(annotation: Any) -> str:  # noqa: ANN401 - any annotation
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " \\| ".join(json.dumps(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " \\| ".join(dict.fromkeys(_type_name(part) for part in parts))
    if origin in (list, tuple):
        inner = ", ".join(_type_name(part) for part in parts if part is not ...)
        return f"list of {inner}"
    if origin is dict or origin is Mapping:
        return f"mapping of {_type_name(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names = {str: "string", int: "integer", float: "number", bool: "boolean", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        return ""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_DEFAULT else f"{text[: MAX_DEFAULT - 1]}…"


def _cell(text: str) -> str:
    """Return the text for a cell of a Markdown table."""
    return text.replace("\\|", "|").replace("|", "\\|")
