"""Loading of recipes: read, expand, validate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config import build, located, read_recipe
from align.errors import InputError
from align.pipeline import Step, order
from align.workflow.expansion import expand
from align.workflow.schema import Recipe, WrittenRecipe
from align.workflow.validation import validate


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the validated recipe at `path`, with `key.sub=value` overrides.

    An `InputError` begins with the line of the file, or the override, that has to change.
    """
    values = read_recipe(path, overrides)
    with located(path, overrides):
        recipe = expand_recipe(values)
        validate(recipe)
    return recipe


def expand_recipe(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values: expand its steps and check that they can run in some order."""
    given = values.get("steps")
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"a mapping from a step's name to its settings is needed, not {given!r}", ("steps",))
    written = build(WrittenRecipe, {**values, "steps": {}})
    placed = expand(given)
    recipe = Recipe(
        **{name: getattr(written, name) for name in WrittenRecipe.model_fields if name != "steps"},
        steps={each.name: each.step for each in placed},
        written={each.name: (each.origin, *map(str, each.below)) for each in placed},
    )
    try:
        order([Step(name, recipe.inputs(name), key="") for name in recipe.steps])
    except InputError as error:
        error.loc = ("steps", recipe.written[str(error.loc[1])][0])
        raise
    return recipe
