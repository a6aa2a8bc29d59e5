"""Validation of a whole recipe: names, kinds of inputs, and settings against what they read."""

from __future__ import annotations

from align.errors import InputError, within
from align.registry import suggest
from align.stages.base import GROUPS, SOURCE
from align.stages.inputs.sources import check_source
from align.workflow.schema import Recipe


def validate(recipe: Recipe) -> None:
    """Raise a located `InputError` for the first thing that is wrong with the recipe."""
    _check_policy(recipe)
    for name, source in recipe.data.items():
        with within("data", name):
            check_source(source)
    for name in recipe.steps:
        _check_step(recipe, name)
    check_columns(recipe)


def _check_policy(recipe: Recipe) -> None:
    """Raise unless the recipe names its policy in one way, where a step starts from it."""
    policy = recipe.policy
    if policy.path is not None and policy.from_config is not None:
        raise InputError(
            "give either path (hub id, folder or gguf:FILE) or from_config (a configuration), not both", ("policy",)
        )
    if policy.path is not None or policy.from_config is not None:
        return
    for name, step in recipe.steps.items():
        if step.needs_policy():
            raise InputError(
                f"step {recipe.written[name][0]!r} starts from it: give path (hub id, folder or gguf:FILE) or "
                "from_config (a configuration)",
                ("policy",),
            )


def _check_step(recipe: Recipe, name: str) -> None:
    step = recipe.steps[name]
    try:
        for each in step.inputs():
            with within(*each.loc):
                _check_input(recipe, each.name, each.kinds)
        step.validate_inputs(recipe.resolved(name))
    except InputError as error:
        if error.loc[:1] != ("policy",) or len(error.loc) == 1:  # the recipe's own policy otherwise
            error.loc = recipe.location(name, error.loc)
        raise


def _check_input(recipe: Recipe, name: str, kinds: tuple[str, ...]) -> None:
    """Raise unless `name` is a source or a step of one of these kinds."""
    if name in recipe.steps and name in recipe.data:
        raise InputError(f"{name!r} is both a step and a source of data; rename one of them")
    if name in recipe.data and SOURCE in kinds:
        return
    made = recipe.steps[name].makes if name in recipe.steps else None
    if made in kinds:
        return
    if SOURCE in kinds and (made is None or GROUPS not in kinds):
        raise InputError(f"no source of data is called {name!r}; {suggest(name, recipe.data)}")
    if made is None:
        raise InputError(f"no step is called {name!r}; {suggest(name, recipe.steps)}")
    steps = " or ".join(kind for kind in kinds if kind != SOURCE)
    raise InputError(f"step {name!r} makes {made}, not {steps}")


def check_columns(recipe: Recipe) -> None:
    """Raise where two evaluations would write different things into one column of the table."""
    seen: dict[str, tuple[str, object]] = {}
    for name, step in recipe.steps.items():
        for column, loc, asked in step.columns(recipe.resolved(name)):
            at = recipe.location(name, loc)
            place = ".".join(map(str, at))
            other, same = seen.setdefault(column, (place, asked))
            if same != asked:
                raise InputError(
                    f"its column {column!r} of the table is that of {other} too, which asks something else; rename one "
                    "of them",
                    at,
                )
