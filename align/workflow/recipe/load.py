"""Loading of recipes: read, expand, validate. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config import build, located, read_recipe
from align.errors import ErrorList, InputError, InputErrors
from align.pipeline import order
from align.workflow.recipe.expansion import expand
from align.workflow.recipe.hints import with_hints
from align.workflow.recipe.schema import Recipe, WrittenRecipe
from align.workflow.recipe.validation import validate
from align.workflow.search.trials import with_trials


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the validated recipe at `path`, with `key.sub=value` overrides.

    All errors of the recipe are raised together. Each begins with the line of the file, or the override, that has to
    change.
    """
    values = read_recipe(path := Path(path), overrides)
    with located(path, overrides):
        return validated_recipe(values)


def validated_recipe(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values and validate it. The parts that can be built are validated in any case.

    Trials of searches are made of a recipe that is valid without them.
    """
    errors = ErrorList()
    broken = set[str]()
    recipe = _expanded(values, errors, broken)
    with errors.collect():
        validate(recipe, broken)
    if recipe.search and not errors.found:
        with errors.collect():
            recipe = with_trials(values, recipe, _built)
            validate(recipe)
    if errors.found:
        steps = values.get("steps")
        given = steps.items() if isinstance(steps, Mapping) else ()
        stages = {str(name): str(step.get("stage")) for name, step in given if isinstance(step, Mapping)}
        raise with_hints(InputErrors(errors.found), stages)
    return recipe


def _built(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of plain values; raise if a part of it cannot be built."""
    errors = ErrorList()
    recipe = _expanded(values, errors, set())
    errors.raise_found()
    return recipe


def _expanded(values: Mapping[str, Any], errors: ErrorList, broken: set[str]) -> Recipe:
    """Return the recipe of everything that can be built; `broken` receives the names of sources and steps that cannot.

    The name of a section is among them where it is the section that cannot be built.
    """
    given = values.get("steps")
    written = _sections({**values, "steps": {}}, errors, broken)
    if not isinstance(given, Mapping) or not given:
        message = f"a mapping from a step's name to its settings is needed, not {given!r}"
        errors.found.append(InputError(message, ("steps",)))
        given = {}
    placed = expand(given, errors, broken)
    sources = written.data
    tested = [name for each in placed for name in each.step.tests() if name in sources and not sources[name].made_by]
    tested = list(dict.fromkeys(tested))
    recipe = Recipe(
        **{name: getattr(written, name) for name in WrittenRecipe.model_fields if name != "steps"},
        steps={each.name: each.step.with_tests(tested) for each in placed},
        written={each.name: (each.origin, *map(str, each.below)) for each in placed},
    )
    with errors.collect():
        _check_order(recipe)
    return recipe


def _sections(values: dict[str, Any], errors: ErrorList, broken: set[str]) -> WrittenRecipe:
    """Return the sections of a recipe besides its steps; what cannot be built is left out."""
    try:
        return build(WrittenRecipe, values)
    except InputError as error:
        errors.found += error.parts
        for part in error.parts:
            section, *name = part.loc
            if section == "data" and name and isinstance(values["data"], Mapping):
                values["data"] = {key: each for key, each in values["data"].items() if str(key) != name[0]}
                broken.add(str(name[0]))
            else:
                values.pop(str(section), None)
        broken |= {name for name in ("run", "policy") if name not in values}  # required
    return build(WrittenRecipe, {"run": "run", "policy": {}, **values})


def _check_order(recipe: Recipe) -> None:
    """Raise if the steps cannot run in any order."""
    try:
        order(recipe.graph())
    except InputError as error:
        error.loc = ("steps", recipe.written[str(error.loc[1])][0])
        raise
