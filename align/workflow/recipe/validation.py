"""Validation of a whole recipe: names, kinds of inputs, and settings against what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from align.errors import ErrorList, InputError, dotted_loc, within
from align.registry import suggest
from align.stages.base import GROUPS, SOURCE
from align.stages.inputs.sources import check_source
from align.workflow.recipe.schema import Recipe


def validate(recipe: Recipe, broken: Collection[str] = ()) -> None:
    """Raise everything that is wrong with the recipe, each error with its location.

    `broken` are the names of sources, steps and sections that have errors already and are left out of the recipe: what
    follows from them is not reported.
    """
    errors, broken, wrong = ErrorList(), set(broken), set[str]()
    if "policy" not in broken:
        with errors.collect():
            _check_policy(recipe)
        broken |= {"policy"} if errors.found else set()
    if recipe.tracking.trackers:
        from align.train.tracking import check_trackers  # noqa: PLC0415 - imports torch

        with errors.collect():
            check_trackers(recipe.tracking.trackers, ("tracking", "trackers"))
    for name, source in recipe.data.items():
        with errors.collect(), within("data", name):
            check_source(source)
    for name in recipe.steps:
        origin = recipe.written[name][0]
        found = _step_errors(recipe, name, broken) if origin not in wrong else []  # rounds repeat their errors
        errors.found += found
        wrong |= {origin} if found else set()
    if not errors.found and not broken:
        with errors.collect():
            check_columns(recipe)
    errors.found = _merged(errors.found)
    errors.raise_found()


def _merged(errors: Iterable[InputError]) -> list[InputError]:
    """Return the errors, of those that say the same only the first, which then names the other places."""
    places: dict[str, list[InputError]] = {}
    for error in errors:
        places.setdefault(error.message, []).append(error)
    for first, *others in places.values():
        also = ", ".join(dotted_loc(error.loc) for error in others)
        first.message += f" (also {also})" if also else ""
    return [first for first, *_ in places.values()]


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


def _step_errors(recipe: Recipe, name: str, broken: Collection[str]) -> list[InputError]:
    """Return what is wrong with a step: its settings and inputs, and where these are right, how they fit."""
    step, errors, inputs = recipe.steps[name], ErrorList(), ErrorList()
    with errors.collect():
        step.validate_settings()
    whole = [each for each in step.inputs() if not _is_of(each.name, broken)]
    for each in whole:
        with inputs.collect(), within(*each.loc):
            _check_input(recipe, each.name, each.kinds)
    is_known = len(whole) == len(step.inputs()) and not (step.needs_policy() and "policy" in broken)
    if is_known and not inputs.found:
        with errors.collect():
            step.validate_inputs(recipe.resolved(name))
    found = [*errors.found, *inputs.found]
    for error in found:
        if error.loc[:1] != ("policy",) or len(error.loc) == 1:  # the recipe's own policy otherwise
            error.loc = recipe.location(name, error.loc)
    return found


def _is_of(name: str, broken: Collection[str]) -> bool:
    """Return whether a name is that of a broken source or step, or of one of its rounds."""
    return any(name == each or name.startswith(f"{each}-") for each in broken)


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
