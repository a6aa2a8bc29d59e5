"""The key reference: every recipe key with its type, default and meaning, from the settings themselves.

    python -m align.workflow.reference recipes

writes it into `README.md` and `schema.json` of the folder.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from align.accounting.budget import BudgetSettings
from align.accounting.settings import AccountingSettings
from align.config import Settings
from align.distributed.slurm import SlurmSettings
from align.inference.settings import EngineSettings, SamplingSettings
from align.models.settings import PolicySettings
from align.registry import pick
from align.rewards.settings import JudgeSettings
from align.stages.base import Stage
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.settings import GenerationSettings
from align.stages.table import STAGES
from align.synth.families.family import ChildFamily, Family
from align.synth.families.listing import ListFamily
from align.synth.families.table import FAMILIES
from align.synth.scored_groups import GroupSettings
from align.train.selection.settings import SelectionSettings
from align.train.settings import TrainSettings
from align.workflow.recipe.schema import WrittenRecipe
from align.workflow.search.settings import SearchSettings

REQUIRED = "required"
MAX_DEFAULT = 60  # characters of a default value in the table
BEGIN, END = "<!-- keys:begin -->", "<!-- keys:end -->"  # the reference in the guide is between these lines


class Key(NamedTuple):
    """One key of a recipe."""

    key: str
    type: str
    default: str
    meaning: str
    section: str | None = None  # the section that lists the keys below this one, if they are shared


# Sections of the reference: a part of the recipe, a stage, or settings that several stages contain
SECTIONS: dict[str, tuple[str, type[BaseModel]]] = {
    "recipe": ("Top level", WrittenRecipe),
    "policy": ("policy: the model that the recipe starts from", PolicySettings),
    "data": ("data: a source of rows", SourceSettings),
    "search": ("search: settings of a step that are searched", SearchSettings),
    "accounting": ("accounting: cost and energy", AccountingSettings),
    "budget": ("budget: caps on what a run may use", BudgetSettings),
    **{name: (f"Stage {name}", stage) for name, stage in STAGES.items()},
    "train": ("train: settings of the training loop", TrainSettings),
    "selection": ("selection: choice of the rows of each optimizer step", SelectionSettings),
    "sampling": ("sampling: how responses are sampled", SamplingSettings),
    "engine": ("engine: what runs a policy", EngineSettings),
    "judges": ("judges: what rates responses", JudgeSettings),
    "slurm": ("slurm: submission of a launch to Slurm", SlurmSettings),
    "families": ("families: what a synthesize step makes", Family),
    "groups": ("groups: which responses are trained on", GroupSettings),
}
FAMILY_BASES = (Family, ChildFamily, ListFamily)  # whose keys several families have
SHARED: dict[type[BaseModel], str] = {
    **dict.fromkeys(FAMILIES.values(), "families"),
    **{settings: name for name, (_, settings) in SECTIONS.items() if name != "recipe"},
    GenerationSettings: "generate",
}


def keys(section: str) -> list[Key]:
    """Return every key of a section, nested ones as `key.sub`."""
    _, settings = pick(SECTIONS, section, "section")
    if issubclass(settings, RootModel):  # a union: the keys of each member, common ones once
        members = _inner(settings.model_fields["root"].annotation)
        return list(dict.fromkeys(key for member, _ in members for key in _keys(member, "")))
    return _family_keys() if settings is Family else list(_keys(settings, ""))


def _family_keys() -> list[Key]:
    """Return the keys that every family has, then those of each."""
    names = ", ".join(FAMILIES)
    found = [Key("family", "string", REQUIRED, f"What is made: {names}; or module:Class for your own.")]
    bases = [key for base in FAMILY_BASES for key in _keys(base, "")]
    found += list(dict.fromkeys(bases))
    for name, family in FAMILIES.items():
        own = (key for key in _keys(family, "") if key not in bases)
        found += [key._replace(meaning=f"Of {name}: {key.meaning}") for key in own]
    return found


def markdown() -> str:
    """Return the whole reference as Markdown tables."""
    parts: list[str] = []
    for name, (title, settings) in SECTIONS.items():
        rows = [_row(key) for key in keys(name)]
        intro = (settings.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"### {title}", "", " ".join(intro.split()), "", *table]))
    return "\n\n".join(parts) + "\n"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for completion in an editor."""
    schema = WrittenRecipe.model_json_schema()
    for stage in (*STAGES.values(), Stage):
        definition = schema["$defs"][stage.__name__]
        definition["required"] = ["stage", *definition.get("required", ())]
        for name in stage.refused:
            del definition["properties"][name]
    own = schema["$defs"][Stage.__name__]  # a user's own stage: module:Class, with settings that are not known here
    own["additionalProperties"] = True
    own["properties"]["stage"]["pattern"] = ":"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "align recipe", **schema}


def schema_text() -> str:
    """Return the JSON Schema as the text of a file."""
    return json.dumps(json_schema(), indent=1) + "\n"


def with_reference(guide: str) -> str:
    """Return the guide with the current reference between its marks."""
    before, rest = guide.split(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{rest.split(END)[1]}"


def _keys(settings: type[BaseModel], prefix: str) -> Iterator[Key]:
    """Yield the keys of settings, without those that they refuse."""
    refused = tuple(f"{prefix}{name}." for name in settings.refused) if issubclass(settings, Settings) else ()
    return (key for key in _all_keys(settings, prefix) if not f"{key.key}.".startswith(refused))


def _all_keys(settings: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in settings.model_fields.items():
        if name in ("stage", "family"):  # which settings these are
            continue
        nested = [each for each in _inner(field.annotation) if not issubclass(each[0], Stage)]
        section = next((SHARED[inner] for inner, _ in nested if inner in SHARED), None)
        meaning = " ".join((field.description or "").split())
        yield Key(f"{prefix}{name}", _type_name(field.annotation), _default(field), meaning, section)
        if section is None and settings is not WrittenRecipe:
            for inner, suffix in nested:
                yield from _keys(inner, f"{prefix}{name}{suffix}.")


def _inner(annotation: Any) -> list[tuple[type[BaseModel], str]]:  # noqa: ANN401 - any annotation
    """Return the settings in an annotation, with what stands between their keys and the field's."""
    origin = get_origin(annotation)
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
    """Return the default as JSON; empty if it depends on the machine, or if it is the nested keys' own defaults."""
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(value) if value else ""
    if field.default_factory is not None and value:
        return ""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_DEFAULT else f"{text[: MAX_DEFAULT - 1]}…"


def _row(key: Key) -> str:
    """Return a row of a Markdown table."""
    meaning = _cell(key.meaning)
    if key.section is not None:
        meaning += f" Keys: [{key.section}](#{_anchor(SECTIONS[key.section][0])})."
    return f"| `{key.key}` | {_cell(key.type)} | {_cell(key.default)} | {meaning} |"


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    """Return the text for a cell of a Markdown table."""
    return text.replace("\\|", "|").replace("|", "\\|")


def _update(folder: Path) -> None:
    guide = folder / "README.md"
    guide.write_text(with_reference(guide.read_text("utf-8")), "utf-8")
    (folder / "schema.json").write_text(schema_text(), "utf-8")


if __name__ == "__main__":
    _update(Path(sys.argv[1]))
